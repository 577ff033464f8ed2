/** CBOR (RFC 8949) as people write and read it. */
import { decode } from "cborg";

export function toHex(bytes: Uint8Array, width = 0): string {
  const out: string[] = [];
  for (let i = 0; i < bytes.length; i++) out.push((i > 0 ? (width > 0 && i % width === 0 ? "\n" : " ") : "") + bytes[i]!.toString(16).padStart(2, "0"));
  return out.join("");
}

/** Hexadecimal digits in any case, with any space between; undefined for what is none. */
export function fromHex(text: string): Uint8Array<ArrayBuffer> | undefined {
  const digits = text.replace(/[\s,:]|0x/gi, "");
  if (digits.length % 2 !== 0 || /[^0-9a-f]/i.test(digits)) return undefined;
  const out = new Uint8Array(digits.length / 2);
  for (let i = 0; i < out.length; i++) out[i] = parseInt(digits.slice(2 * i, 2 * i + 2), 16);
  return out;
}

/** One item in diagnostic notation (RFC 8949, Section 8). Throws where it is none. */
export function diagnostic(bytes: Uint8Array): string {
  return write(decode(bytes, { useMaps: true, allowBigInt: true, allowIndefinite: true, allowUndefined: true, allowNaN: true, allowInfinity: true }));
}

/** Without calling itself, for the sake of deep ones. */
function write(value: unknown): string {
  let out = "";
  const todo: (string | { value: unknown })[] = [{ value }];
  while (todo.length > 0) {
    const next = todo.pop()!;
    if (typeof next === "string") {
      out += next;
      continue;
    }
    const v = next.value;
    if (v instanceof Uint8Array) out += `h'${toHex(v).replace(/ /g, "")}'`;
    else if (Array.isArray(v)) {
      out += "[";
      todo.push("]");
      for (let i = v.length - 1; i >= 0; i--) todo.push({ value: v[i] as unknown }, i > 0 ? ", " : "");
    } else if (v instanceof Map) {
      out += "{";
      todo.push("}");
      const all = [...v.entries()] as [unknown, unknown][];
      for (let i = all.length - 1; i >= 0; i--) todo.push({ value: all[i]![1] }, ": ", { value: all[i]![0] }, i > 0 ? ", " : "");
    } else if (typeof v === "string") out += JSON.stringify(v);
    else out += String(v);
  }
  return out;
}
