/** Comma-separated values (RFC 4180), for spreadsheets. */

/**
 * A cell. Texts that a spreadsheet would run as a formula get an apostrophe in front: what a device says must not calculate on
 * the machine of whoever opens the file.
 */
export function cell(value: unknown): string {
  if (value === undefined || value === null) return "";
  if (typeof value === "number" || typeof value === "boolean" || typeof value === "bigint") return String(value);
  let text = typeof value === "string" ? value : JSON.stringify(value);
  if (/^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

export function csv(header: readonly string[], rows: Iterable<readonly unknown[]>): string {
  const out = [header.map(cell).join(",")];
  for (const row of rows) out.push(row.map(cell).join(","));
  return `${out.join("\r\n")}\r\n`;
}
