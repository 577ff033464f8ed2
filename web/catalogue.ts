/** docs/errors.md as a page: as much of Markdown as that page uses. Each code is an anchor. */
export function catalogue(markdown: string): string {
  const out: string[] = [];
  let table = 0;
  let list = false;
  for (const line of markdown.split("\n")) {
    const row = line.startsWith("|") ? line.slice(1, line.lastIndexOf("|")).split(/(?<!\\)\|/).map((c) => c.trim()) : undefined;
    if (!row && table > 0) {
      out.push("</tbody></table>");
      table = 0;
    }
    if (list && !line.startsWith("- ") && !line.startsWith("  ")) {
      out.push("</ul>");
      list = false;
    }
    if (row) {
      if (table === 0) out.push(`<table><thead><tr>${row.map((c) => `<th>${inline(c)}</th>`).join("")}</tr></thead><tbody>`);
      else if (table > 1) {
        const code = /^`([a-z0-9-]+)`$/.exec(row[0] ?? "")?.[1] ?? (/^[a-z-]+$/.test(row[0] ?? "") ? row[0] : undefined);
        out.push(`<tr${code ? ` id="${code}"` : ""}>${row.map((c) => `<td>${inline(c)}</td>`).join("")}</tr>`);
      }
      table++;
    } else if (line.startsWith("#")) {
      const level = /^#+/.exec(line)![0].length;
      out.push(`<h${level}>${inline(line.slice(level).trim())}</h${level}>`);
    } else if (line.startsWith("- ")) {
      if (!list) out.push("<ul>");
      list = true;
      out.push(`<li>${inline(line.slice(2))}`);
    } else if (line === "") out.push("<p>");
    else out.push(inline(line));
  }
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Errors of the hub</title>
<link rel="icon" href="/console/icon.svg">
<link rel="stylesheet" href="/console/errors.css">
</head>
<body><main>
${out.join("\n")}
</main></body>
</html>
`;
}

function inline(text: string): string {
  return text
    .replace(/&/g, "&amp;")
    .replace(/</g, "&lt;")
    .replace(/\\\|/g, "|")
    .replace(/`([^`]*)`/g, "<code>$1</code>")
    .replace(/\*\*([^*]+)\*\*/g, "<strong>$1</strong>")
    .replace(/\*([^*]+)\*/g, "<em>$1</em>")
    .replace(/\[([^\]]*)\]\([^)]*\)/g, "$1");
}
