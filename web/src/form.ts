/** What a form may ask for, made of a value, of its resource's types and interfaces, and of what the value says of itself. */
import { drawable, isNested, member } from "./paths";
import { same } from "./diff";

export interface Limits {
  min?: number;
  max?: number;
  step?: number;
  options?: readonly string[];
  readOnly?: boolean;
}

// Of OCF's resource types (Resource Type Specification 2.2), what the values do not say of themselves. By type, then member.
const known: Record<string, Record<string, Limits>> = {
  "oic.r.light.brightness": { brightness: { min: 0, max: 100, step: 1 } },
  "oic.r.light.dimming": { dimmingSetting: { step: 1 } },
  "oic.r.openlevel": { openLevel: { min: 0, max: 100 } },
  "oic.r.audio": { volume: { min: 0, max: 100, step: 1 } },
  "oic.r.colour.rgb": { rgbValue: { min: 0, max: 255, step: 1 } },
  "oic.r.temperature": { units: { options: ["C", "F", "K"] } },
  "oic.r.humidity": { humidity: { readOnly: true }, desiredHumidity: { min: 0, max: 100 } },
  "oic.r.energy.battery": { charge: { readOnly: true } },
  "oic.r.lock.status": { lockState: { options: ["Locked", "Unlocked"] } },
  "oic.r.mode": { supportedModes: { readOnly: true } },
};

// Members by which a value describes itself or its resource: nobody sets them.
const descriptive = new Set(["range", "step", "precision", "minimum", "maximum", "rt", "if"]);

const sensors = ["oic.if.s", "oic.if.r"];
const actuators = ["oic.if.a", "oic.if.rw", "oic.if.w"];

/** Whether its interfaces let nobody change a resource (OCF Core, Section 7.6). The device has the last word. */
export function readOnly(interfaces: readonly string[], types: readonly string[]): boolean {
  if (types.some((t) => t === "oic.wk.d" || t === "oic.wk.p" || t === "oic.wk.res")) return true;
  return interfaces.some((i) => sensors.includes(i)) && !interfaces.some((i) => actuators.includes(i));
}

/** Interfaces with which an update makes sense, the best first. */
export function updateInterfaces(interfaces: readonly string[]): string[] {
  return interfaces.filter((i) => !sensors.includes(i) && i !== "oic.if.ll").sort((a, b) => Number(actuators.includes(b)) - Number(actuators.includes(a)));
}

/** What a member of an object, or an item of it that is a list, may be. */
export function limitsOf(holder: unknown, key: string, types: readonly string[]): Limits {
  if (descriptive.has(key)) return { readOnly: true };
  const out: Limits = {};
  for (const t of types) Object.assign(out, Object.hasOwn(known, t) && Object.hasOwn(known[t]!, key) ? known[t]![key] : {});
  const value = member(holder, key);
  if (typeof value !== "number") return out;
  const [min, max] = range(member(holder, "range")) ?? [member(holder, "minimum"), member(holder, "maximum")].map(drawable);
  if (typeof min === "number") out.min = min;
  if (typeof max === "number") out.max = max;
  const step = drawable(member(holder, "step"));
  if (step !== null && step > 0) out.step = step;
  return out;
}

/** A range as a list of two numbers, or as OCF wrote it before, as a text of two. */
function range(value: unknown): [number, number] | undefined {
  const two = typeof value === "string" ? value.split(",").map((s) => (s.trim() === "" ? NaN : Number(s))) : value;
  if (!Array.isArray(two) || two.length !== 2 || !two.every((n) => typeof n === "number" && Number.isFinite(n))) return undefined;
  return two as [number, number];
}

export type Problem = "number" | "min" | "max" | "step";

/** A number as it was typed; what is wrong with it otherwise. */
export function number(text: string, { min, max, step }: Limits): { value: number } | { problem: Problem } {
  const value = Number(text.trim().replace(",", "."));
  if (text.trim() === "" || !Number.isFinite(value)) return { problem: "number" };
  if (min !== undefined && value < min) return { problem: "min" };
  if (max !== undefined && value > max) return { problem: "max" };
  if (step !== undefined) {
    const steps = (value - (min ?? 0)) / step;
    if (Math.abs(steps - Math.round(steps)) > 1e-6) return { problem: "step" };
  }
  return { value };
}

/** A number that did not come through JSON unharmed: it is shown, and only raw can it be set. */
export function inexact(value: unknown): boolean {
  return typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
}

/** Something like an item, to begin with. */
export function blank(like: unknown): unknown {
  if (Array.isArray(like)) return [];
  if (isNested(like)) return Object.fromEntries(Object.entries(like).map(([k, v]) => [k, isNested(v) ? (Array.isArray(v) ? [] : {}) : blank(v)]));
  return typeof like === "number" ? 0 : typeof like === "boolean" ? false : typeof like === "string" ? "" : null;
}

/**
 * What is sent: of an object only the members that changed, for an update changes just those (OCF Core, Section 8.4) and a device
 * may refuse others; all of it if that is asked for, or nothing changed.
 */
export function toSend(before: unknown, draft: unknown, all: boolean): unknown {
  if (all || !isNested(before) || !isNested(draft) || Array.isArray(before) || Array.isArray(draft)) return draft;
  const changed = Object.entries(draft).filter(([k, v]) => !Object.hasOwn(before, k) || !same(v, before[k]));
  return changed.length > 0 ? Object.fromEntries(changed) : draft;
}

/**
 * A draft upon a newer value: members that nobody edited are the newer ones. base is what the edited ones were when they were
 * begun; moved, that one of those is another now.
 */
export function rebase(base: unknown, draft: unknown, now: unknown): { base: unknown; draft: unknown; moved: boolean } {
  if (same(base, draft)) return { base: now, draft: now, moved: false };
  if (![base, draft, now].every((v) => isNested(v) && !Array.isArray(v))) return { base, draft, moved: !same(base, now) };
  const [b, d, n] = [base, draft, now] as [Record<string, unknown>, Record<string, unknown>, Record<string, unknown>];
  const [bs, ds] = [new Map(Object.entries(n)), new Map(Object.entries(n))];
  let moved = false;
  for (const [k, v] of Object.entries(d)) {
    if (same(v, member(b, k))) continue;
    bs.set(k, member(b, k));
    ds.set(k, v);
    moved ||= !same(member(b, k), member(n, k));
  }
  return { base: Object.fromEntries(bs), draft: Object.fromEntries(ds), moved };
}

/** The resource to show first: one that can be changed, if there is one, and none of those that every device has. */
export function first(hrefs: readonly string[], links: ReadonlyMap<string, { interfaces?: string[] | null; resourceTypes?: string[] | null }>): string {
  const own = hrefs.filter((h) => !h.startsWith("/oic/"));
  const changeable = own.find((h) => (links.get(h)?.interfaces ?? []).some((i) => actuators.includes(i)));
  return changeable ?? own[0] ?? hrefs[0] ?? "";
}
