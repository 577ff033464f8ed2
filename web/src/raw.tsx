/** A content as it stands: JSON, or the bytes of CBOR with what they mean. */
import { encode } from "cborg";
import { useMemo, useState } from "react";
import { diagnostic, fromHex, toHex } from "./cbor";
import { texts } from "./texts";
import { Choice } from "./ui";
import { visible } from "./visible";

const t = texts.device.raw;

export interface RawDraft {
  as: "json" | "cbor";
  text: string;
}

const indentBelow = 64 * 1024; // characters: a larger text is not made larger

/** A value as a text to edit. */
export function jsonOf(value: unknown): string {
  try {
    const text = JSON.stringify(value) ?? "";
    return text.length < indentBelow ? (JSON.stringify(value, undefined, 2) ?? "") : text;
  } catch {
    return ""; // deeper than this browser writes
  }
}

/** What a draft means: what is to be sent, or what is wrong with it. */
export function parse(d: RawDraft): { body: unknown } | { wrong: string } {
  try {
    if (d.as === "json") return { body: JSON.parse(d.text) as unknown };
    const bytes = fromHex(d.text);
    if (!bytes || bytes.length === 0) return { wrong: t.notHex };
    diagnostic(bytes);
    return { body: bytes };
  } catch (error) {
    return { wrong: error instanceof Error ? error.message : String(error) };
  }
}

/** bytes is the content as the device sent it, if that is CBOR. */
export function Raw({ draft, onChange, value, bytes }: { draft: RawDraft; onChange: (d: RawDraft) => void; value: unknown; bytes: Uint8Array | undefined }) {
  const parsed = useMemo(() => parse(draft), [draft]);
  const meant = useMemo(() => {
    if (draft.as !== "cbor" || !("body" in parsed)) return "";
    try {
      return diagnostic(parsed.body as Uint8Array);
    } catch {
      return "";
    }
  }, [draft, parsed]);
  const [whole, setWhole] = useState(false);
  const to = (as: RawDraft["as"]) => {
    if (as === draft.as) return;
    // What was typed goes along, where it can be said the other way.
    const now = "body" in parsed ? parsed.body : undefined;
    if (as === "cbor") {
      let coded = bytes;
      try {
        if (now !== undefined && JSON.stringify(now) !== JSON.stringify(value)) coded = encode(now);
        else coded ??= encode(value ?? null);
      } catch { /* too deep to be coded here: it begins with what the device sent, or with nothing */ }
      onChange({ as, text: coded ? toHex(coded, 16) : "" });
    } else onChange({ as, text: jsonOf(value) });
  };
  return (
    <div className="raw">
      <Choice label={t.as} value={draft.as} onChange={to} options={[["json", t.json], ["cbor", t.cbor]]} />
      <textarea
        className="code" aria-label={draft.as === "json" ? t.json : t.cbor} value={draft.text} spellCheck={false} autoComplete="off" rows={10}
        aria-invalid={"wrong" in parsed} onChange={(e) => onChange({ ...draft, text: e.target.value })}
      />
      {"wrong" in parsed && draft.text.trim() !== "" && <p className="bad" role="status">{visible(parsed.wrong.slice(0, 300))}</p>}
      {meant && (
        <>
          <p><small>{t.means}</small></p>
          <pre tabIndex={0}>{visible(whole ? meant : meant.slice(0, 2000))}{!whole && meant.length > 2000 && "…"}</pre>
          {meant.length > 2000 && <label><input type="checkbox" checked={whole} onChange={(e) => setWhole(e.target.checked)} /> {t.whole}</label>}
        </>
      )}
    </div>
  );
}
