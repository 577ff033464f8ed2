/** What devices say, so that it can be read and does nothing else. */

// Controls, and what turns the direction of text around (Unicode TR #36, Section 2.10): shown as they are written in JSON.
// eslint-disable-next-line no-control-regex
const unseen = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** A text in which everything can be seen; line feeds and tabs stay. */
export function visible(text: string): string {
  return text.replace(unseen, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** The same on one line, cut off where it gets long. */
export function line(text: string, most = 200): string {
  const cut = text.length > most ? `${text.slice(0, most)}…` : text;
  return visible(cut).replace(/\n/g, "\\n").replace(/\t/g, "\\t");
}

/** A content that the hub did not decode; an empty one has neither type nor data. */
export interface Opaque {
  contentType?: string;
  coapContentFormat: number;
  data?: string;
}

/** Whether a value is a content that came undecoded, in base64. */
export function isOpaque(value: unknown): value is Opaque {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return false;
  const { contentType = "", coapContentFormat, data = "", ...rest } = value as Record<string, unknown>;
  return typeof contentType === "string" && typeof coapContentFormat === "number" && typeof data === "string" && Object.keys(rest).length === 0;
}

export function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}
