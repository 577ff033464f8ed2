// Shows the OpenAPI description of this hub. Text only ever becomes text nodes, never markup; the token stays in the page's
// memory and goes to this hub alone, in a header.
"use strict";

const el = (tag, props, ...children) => {
  const e = Object.assign(document.createElement(tag), props);
  e.append(...children.filter((c) => c != null && c !== ""));
  return e;
};

let doc;

// deref follows "#/…" references.
function deref(x) {
  for (let n = 0; x && x.$ref && n < 8; n++) {
    x = x.$ref.slice(2).split("/").reduce((o, k) => o && o[k.replace(/~1/g, "/").replace(/~0/g, "~")], doc);
  }
  return x || {};
}

// typeOf says in a few words what a schema is; references name their schema, which is listed below.
function typeOf(schema) {
  if (!schema) return "any";
  if (schema.$ref) return schema.$ref.split("/").pop();
  for (const k of ["oneOf", "anyOf", "allOf"]) if (schema[k]) return schema[k].map(typeOf).join(k === "allOf" ? " & " : " | ");
  if (schema.type === "array") return "[" + typeOf(schema.items) + "]";
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.type === "object" && schema.properties) {
    return "{" + Object.entries(schema.properties).map(([n, s]) => n + ": " + typeOf(s)).join(", ") + "}";
  }
  return Array.isArray(schema.type) ? schema.type.join(" | ") : schema.type || "any";
}

const paragraphs = (text) => (text || "").trim().split(/\n\s*\n/).filter(Boolean).map((t) => el("p", {}, t.replace(/\s*\n\s*/g, " ")));

function table(head, rows) {
  if (!rows.length) return null;
  return el("table", {}, el("tr", {}, ...head.map((h) => el("th", {}, h))), ...rows.map((r) => el("tr", {}, ...r.map((c) => el("td", {}, c)))));
}

function operation(method, path, item, op) {
  const params = [...(item.parameters || []), ...(op.parameters || [])].map(deref);
  const inputs = new Map();
  const rows = params.map((p) => {
    const input = el("input", { type: "text", ariaLabel: p.name, placeholder: p.required ? "needed" : "" });
    inputs.set(p, input);
    return [el("code", {}, p.name), p.in, typeOf(p.schema), p.description || "", input];
  });
  const body = op.requestBody && deref(op.requestBody);
  const bodyType = body && Object.keys(body.content)[0];
  const bodyInput = body && el("textarea", { ariaLabel: "body", value: JSON.stringify(body.content[bodyType].example || {}, null, 1) });
  const out = el("pre", { hidden: true });
  const send = el("button", { type: "button" }, "Send");
  send.onclick = async () => {
    let target = path;
    const query = new URLSearchParams();
    const headers = new Headers();
    for (const [p, input] of inputs) {
      if (p.in === "path") target = target.replace("{" + p.name + "}", input.value.split("/").map(encodeURIComponent).join("/"));
      else if (input.value === "") continue;
      else if (p.in === "query") for (const v of p.schema && p.schema.type === "array" ? input.value.split(",") : [input.value]) query.append(p.name, v);
      else if (p.in === "header") headers.set(p.name, input.value);
    }
    const token = document.getElementById("token").value;
    if (token) headers.set("Authorization", "Bearer " + token);
    if (body) headers.set("Content-Type", bodyType);
    if (query.size) target += "?" + query;
    out.hidden = false;
    out.textContent = "…";
    try {
      const r = await fetch(target, { method: method.toUpperCase(), headers, body: body ? bodyInput.value : undefined, credentials: "omit" });
      const text = await r.text();
      out.textContent = r.status + " " + r.statusText + "\n" + [...r.headers].map(([n, v]) => n + ": " + v).join("\n") + "\n\n" + text;
    } catch (e) {
      out.textContent = String(e);
    }
  };
  const answers = Object.entries(op.responses).map(([status, r]) => {
    const d = deref(r);
    return [el("code", {}, status), (d.description || "").trim(), Object.entries(d.content || {}).map(([t, m]) => t + ": " + typeOf(m.schema)).join("\n")];
  });
  const open = op.security && !op.security.length;
  const e = el("details", { className: "operation" },
    el("summary", {}, el("span", { className: "method " + method }, method.toUpperCase()), el("code", {}, path), " — ", op.summary || ""),
    el("div", {}, ...paragraphs(op.description), el("p", {}, open ? "Needs no token." : "Needs an access token."),
      table(["parameter", "in", "type", "meaning", "value"], rows),
      body && el("div", {}, el("p", {}, "Body: " + Object.entries(body.content).map(([t, m]) => t + ": " + typeOf(m.schema)).join(", ")), bodyInput),
      table(["status", "answer", "body"], answers), send, out));
  e.dataset.find = [method, path, op.operationId, op.summary, ...(op.tags || [])].join(" ").toLowerCase();
  return e;
}

function render() {
  const main = document.getElementById("operations");
  main.replaceChildren(...paragraphs(doc.info.description));
  for (const tag of doc.tags) {
    const section = el("section", {}, el("h2", {}, tag.name), ...paragraphs(tag.description));
    for (const [path, item] of Object.entries(doc.paths)) {
      for (const method of ["get", "post", "put", "patch", "delete"]) {
        if (item[method] && (item[method].tags || []).includes(tag.name)) section.append(operation(method, path, item, item[method]));
      }
    }
    main.append(section);
  }
  const schemas = el("section", {}, el("h2", {}, "schemas"));
  for (const [name, s] of Object.entries(doc.components.schemas)) {
    const rows = Object.entries(s.properties || {}).map(([n, p]) => [el("code", {}, n), typeOf(p), (deref(p).description || p.description || "").trim()]);
    schemas.append(el("details", {}, el("summary", {}, el("code", {}, name)),
      el("div", {}, ...paragraphs(s.description), table(["member", "type", "meaning"], rows) || el("p", {}, typeOf(s)))));
  }
  main.append(schemas);
}

document.getElementById("find").oninput = (ev) => {
  const words = ev.target.value.toLowerCase().split(/\s+/);
  for (const e of document.querySelectorAll(".operation")) e.hidden = !words.every((w) => e.dataset.find.includes(w));
};

fetch("/api/v1/openapi.json", { credentials: "omit" })
  .then((r) => (r.ok ? r.json() : Promise.reject(new Error("status " + r.status))))
  .then((d) => { doc = d; render(); })
  .catch((e) => document.getElementById("operations").replaceChildren("openapi.json could not be read: " + e.message));
