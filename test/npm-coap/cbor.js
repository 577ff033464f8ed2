// cbor encodes what a device says: maps, lists, text, whole numbers and truth (RFC 8949, Section 3).
export function cbor (v) {
  const join = parts => Uint8Array.from(parts.flatMap(p => [...p]))
  const head = (major, n) => n < 24
    ? [major << 5 | n]
    : n < 256 ? [major << 5 | 24, n] : [major << 5 | 25, n >> 8, n & 255]
  switch (true) {
    case typeof v === 'boolean': return Uint8Array.of(v ? 0xf5 : 0xf4)
    case typeof v === 'number': return Uint8Array.from(head(0, v))
    case typeof v === 'string': {
      const text = new TextEncoder().encode(v)
      return join([head(3, text.length), text])
    }
    case Array.isArray(v): return join([head(4, v.length), ...v.map(cbor)])
  }
  return join([head(5, Object.keys(v).length), ...Object.entries(v).flat().map(cbor)])
}
