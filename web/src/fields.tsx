/** A form made of a value: a switch for what is on or off, a number with its limits, a text, lists and objects inside. */
import { useId, useState } from "react";
import { blank, inexact, limitsOf, number, type Limits, type Problem } from "./form";
import { entries, isNested, join, put } from "./paths";
import { texts } from "./texts";
import { Button } from "./ui";
import { isOpaque, line } from "./visible";

const t = texts.device.form;

const openDepth = 2;
const openItems = 20;
const pieceSize = 50;
const longText = 80;
const longestText = 20_000;

export interface Draft {
  value: unknown;
  /** Numbers as they are typed, by place; only those that are not in the value as they stand. */
  typed: Readonly<Record<string, string>>;
}

interface FieldsProps {
  draft: Draft;
  onChange: (draft: Draft) => void;
  types: readonly string[];
  readOnly: boolean;
}

export function Fields({ draft, ...rest }: FieldsProps) {
  if (isOpaque(draft.value)) return <p className="loading">{t.binary}</p>;
  return <div className="fields"><Place path="" name={t.value} holder={undefined} value={draft.value} depth={0} draft={draft} limits={{}} {...rest} /></div>;
}

/** Whether a draft has a number that is none, or is out of its limits. */
export function broken(draft: Draft): boolean {
  return Object.keys(draft.typed).length > 0;
}

interface PlaceProps extends FieldsProps {
  path: string;
  name: string;
  holder: unknown;
  value: unknown;
  depth: number;
  limits: Limits;
}

function Place(p: PlaceProps) {
  if (isNested(p.value) && !isOpaque(p.value)) return <Group {...p} value={p.value} />;
  return <Single {...p} />;
}

function Group(p: PlaceProps & { value: object }) {
  const { value, path, depth, draft, onChange } = p;
  const list = Array.isArray(value);
  const inner = entries(value);
  const [open, setOpen] = useState(depth < openDepth && inner.length <= openItems);
  const [shown, setShown] = useState(pieceSize);
  const fixed = p.readOnly || p.limits.readOnly === true;
  const fields = (
    <>
      {inner.slice(0, shown).map(([key, v]) => (
        <div className="item" key={list ? `${key}/${inner.length}` : key}>
          <Place
            {...p} path={join(path, key)} name={list ? t.item(Number(key) + 1) : key} holder={value} value={v} depth={depth + 1} readOnly={fixed}
            limits={list ? p.limits : limitsOf(value, key, p.types)}
          />
          {list && !fixed && (
            <Button
              className="small quiet" aria-label={t.remove(line(p.name, 60), Number(key) + 1)}
              onPress={() => onChange({ value: put(draft.value, join(path, key), undefined), typed: without(draft.typed, path) })}
            >✕</Button>
          )}
        </div>
      ))}
      {shown < inner.length && <Button className="small" onPress={() => setShown(shown + pieceSize)}>{texts.device.value.more(inner.length - shown)}</Button>}
      {list && !fixed && (
        <Button className="small" onPress={() => onChange({ ...draft, value: put(draft.value, join(path, inner.length), blank(value[value.length - 1])) })}>{t.add(line(p.name, 60))}</Button>
      )}
      {inner.length === 0 && !list && <p className="loading">{t.empty}</p>}
    </>
  );
  if (depth === 0) return fields;
  return (
    <details className="group" open={open} onToggle={(e) => { if (e.target === e.currentTarget) setOpen(e.currentTarget.open); }}>
      <summary><bdi>{line(p.name, 100)}</bdi> <small>{list ? texts.device.value.items(inner.length) : texts.device.value.members(inner.length)}</small></summary>
      {open && <div className="inside" style={depth > 8 ? { marginInlineStart: 0 } : undefined}>{fields}</div>}
    </details>
  );
}

/** What was typed elsewhere: items behind one that goes move up. */
function without(typed: Readonly<Record<string, string>>, path: string): Record<string, string> {
  return Object.fromEntries(Object.entries(typed).filter(([k]) => k !== path && !k.startsWith(`${path}/`)));
}

function Single({ path, name, value, draft, onChange, limits, readOnly }: PlaceProps) {
  const id = useId();
  const fixed = readOnly || limits.readOnly === true;
  const set = (v: unknown) => onChange({ value: put(draft.value, path, v), typed: without(draft.typed, path) });
  const label = <bdi>{line(name, 100)}</bdi>;
  if (typeof value === "boolean") {
    return <label className="switch"><input type="checkbox" role="switch" checked={value} disabled={fixed} onChange={(e) => set(e.target.checked)} /><span className="track" aria-hidden="true" />{label}</label>;
  }
  if (typeof value === "number" && !inexact(value)) {
    const typed = draft.typed[path];
    const read = typed === undefined ? undefined : number(typed, limits);
    const problem = read && "problem" in read ? read.problem : undefined;
    const change = (text: string) => {
      const now = number(text, limits);
      if ("value" in now) onChange({ value: put(draft.value, path, now.value), typed: without(draft.typed, path) });
      else onChange({ ...draft, typed: { ...draft.typed, [path]: text } });
    };
    const { min, max } = limits;
    const slider = min !== undefined && max !== undefined && !fixed;
    return (
      <div className="field">
        <label htmlFor={id}>{label} {(min !== undefined || max !== undefined) && <small>{t.between(min, max)}</small>}</label>
        <span className="row number">
          {slider && (
            <input type="range" min={min} max={max} step={limits.step ?? "any"} value={value} aria-label={line(name, 100)} onChange={(e) => change(e.target.value)} />
          )}
          <Typed id={id} value={value} typed={typed} disabled={fixed} problem={problem} onChange={change} />
        </span>
        {problem && <small id={`${id}-problem`} className="bad">{explain(problem, limits)}</small>}
      </div>
    );
  }
  if (typeof value === "string" && limits.options && limits.options.includes(value)) {
    return (
      <div className="field">
        <label htmlFor={id}>{label}</label>
        <select id={id} value={value} disabled={fixed} onChange={(e) => set(e.target.value)}>{limits.options.map((o) => <option key={o}>{o}</option>)}</select>
      </div>
    );
  }
  if (typeof value === "string" && value.length <= longestText) {
    return (
      <div className="field">
        <label htmlFor={id}>{label}</label>
        {value.length > longText || value.includes("\n") ? (
          <textarea id={id} dir="auto" value={value} disabled={fixed} spellCheck={false} onChange={(e) => set(e.target.value)} />
        ) : (
          <input id={id} dir="auto" type="text" value={value} disabled={fixed} spellCheck={false} autoComplete="off" onChange={(e) => set(e.target.value)} />
        )}
      </div>
    );
  }
  const why = value === null ? t.isNull : typeof value === "string" ? t.tooLong : isOpaque(value) ? t.binary : t.inexact;
  return <div className="field"><span>{label}</span><small>{why}</small></div>;
}

/** A number's text box. It keeps what is typed where that is the same number written otherwise, such as "1.0". */
function Typed({ id, value, typed, disabled, problem, onChange }: {
  id: string; value: number; typed: string | undefined; disabled: boolean; problem: Problem | undefined; onChange: (text: string) => void;
}) {
  const [text, setText] = useState(String(value));
  const shown = typed ?? (Number(text.trim().replace(",", ".")) === value && text.trim() !== "" ? text : String(value));
  return (
    <input
      id={id} type="text" inputMode="decimal" value={shown} disabled={disabled} autoComplete="off" aria-invalid={problem !== undefined}
      aria-describedby={problem ? `${id}-problem` : undefined} onChange={(e) => { setText(e.target.value); onChange(e.target.value); }}
    />
  );
}

function explain(problem: Problem, { min, max, step }: Limits): string {
  return problem === "number" ? t.notNumber : problem === "step" ? t.notStep(step!) : t.outOf(min, max);
}
