/** What all pages are made of. The accessible widgets are react-aria-components'; here is how this console uses them. */
import { useEffect, useId, useState, type ReactNode } from "react";
import { Button, Dialog, Heading, Input, Label, Modal, ModalOverlay, TextField, type ButtonProps } from "react-aria-components";
import { wrong } from "./api";
import { ago, time } from "./format";
import { texts } from "./texts";

export { Button } from "react-aria-components";

/** Where a code is explained; the code itself is the text, unless another is given. */
export function Code({ code, text }: { code: string; text?: string }) {
  return <a href={`/console/errors.html#${code}`} target="_blank" rel="noreferrer" title={texts.errors}>{text ?? <code>{code}</code>}</a>;
}

/** Why somebody was refused, as the hub says it: a sentence with its code in front, which leads to what it means. */
export function Reason({ of }: { of: string }) {
  const code = /^[a-z0-9-]+(?=:)/.exec(of)?.[0];
  return <>{of} {code && <Code code={code} text={texts.errors} />}</>;
}

/** The hub's own sentence, its code, and where that is explained. */
export function Failure({ error, retry }: { error: unknown; retry?: () => void }) {
  if (!error) return null;
  const { text, code } = wrong(error);
  return (
    <div role="alert" className="failure">
      <span>{text}</span> {code && <Code code={code} />}
      {retry && <Button className="small" onPress={retry}>{texts.retry}</Button>}
    </div>
  );
}

export function Loading({ what = texts.loading }: { what?: string }) {
  return <p role="status" className="loading">{what}</p>;
}

export function Dot({ on }: { on: boolean }) {
  return <span className={on ? "state on" : "state off"}>{on ? texts.devices.online : texts.devices.offline}</span>;
}

/** A moment: how long ago, with the exact time to point at. */
export function Moment({ at }: { at: number }) {
  const [, tick] = useState(0);
  useEffect(() => {
    const t = setInterval(() => tick((n) => n + 1), 15_000);
    return () => clearInterval(t);
  }, []);
  return <time dateTime={at ? new Date(at).toISOString() : undefined} title={time(at)}>{ago(at)}</time>;
}

export function Copy({ text, label = texts.copy }: { text: string; label?: string }) {
  const [done, setDone] = useState(false);
  useEffect(() => {
    if (!done) return;
    const t = setTimeout(() => setDone(false), 1500);
    return () => clearTimeout(t);
  }, [done]);
  return <Button className="small" onPress={() => void navigator.clipboard.writeText(text).then(() => setDone(true))}>{done ? texts.copied : label}</Button>;
}

/** Saves a text as a file. */
export function save(name: string, text: string | Blob, type = "text/plain"): void {
  const url = URL.createObjectURL(typeof text === "string" ? new Blob([text], { type }) : text);
  const a = document.createElement("a");
  a.href = url;
  a.download = name;
  a.click();
  URL.revokeObjectURL(url);
}

export function Window({ title, open, onClose, children, wide }: { title: string; open: boolean; onClose: () => void; children: ReactNode; wide?: boolean }) {
  return (
    <ModalOverlay className="overlay" isOpen={open} onOpenChange={(o) => !o && onClose()} isDismissable>
      <Modal className={wide ? "modal wide" : "modal"}>
        <Dialog className="dialog">
          <Heading slot="title">{title}</Heading>
          {children}
        </Dialog>
      </Modal>
    </ModalOverlay>
  );
}

/** Asks before something that cannot be undone: the person types a word, a name for one. */
export function Confirm({ title, text, word, action, open, onClose, run, more }: {
  title: string; text: string; word: string; action: string; open: boolean; onClose: () => void; run: () => Promise<void>; more?: ReactNode;
}) {
  const [typed, setTyped] = useState("");
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const done = () => {
    setTyped("");
    setError(undefined);
    setBusy(false);
    onClose();
  };
  const go = () => {
    setBusy(true);
    run().then(done, (e: unknown) => {
      setError(e);
      setBusy(false);
    });
  };
  return (
    <Window title={title} open={open} onClose={done}>
      <form onSubmit={(e) => { e.preventDefault(); if (typed === word && !busy) go(); }}>
        <p>{text}</p>
        <TextField value={typed} onChange={setTyped} autoFocus>
          <Label className="hidden">{text}</Label>
          <Input autoComplete="off" spellCheck={false} />
        </TextField>
        {more}
        <Failure error={error} />
        <p className="buttons">
          <Button onPress={done}>{texts.cancel}</Button>
          <Button type="submit" className="danger" isDisabled={typed !== word || busy}>{action}</Button>
        </p>
      </form>
    </Window>
  );
}

export function Field({ label, value, onChange, type = "text", required, hint, autoFocus }: {
  label: string; value: string; onChange: (v: string) => void; type?: string; required?: boolean; hint?: string; autoFocus?: boolean;
}) {
  return (
    <TextField className="field" value={value} onChange={onChange} type={type} isRequired={required ?? false} autoFocus={autoFocus ?? false}>
      <Label>{label}</Label>
      <Input spellCheck={false} autoComplete="off" />
      {hint && <small>{hint}</small>}
    </TextField>
  );
}

/** A native select: on a phone it is the one people know. */
export function Choice<T extends string>({ label, value, onChange, options, hidden }: {
  label: string; value: T; onChange: (v: T) => void; options: readonly (readonly [T, string])[]; hidden?: boolean;
}) {
  const id = useId();
  return (
    <span className="choice">
      <label htmlFor={id} className={hidden ? "hidden" : ""}>{label}</label>
      <select id={id} value={value} onChange={(e) => onChange(e.target.value as T)}>
        {options.map(([v, text]) => <option key={v} value={v}>{text}</option>)}
      </select>
    </span>
  );
}

/** Names and values, under each other on a phone. */
export function Facts({ of }: { of: readonly (readonly [string, ReactNode])[] }) {
  return <dl className="facts">{of.map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{value}</dd></div>)}</dl>;
}

export function Danger(props: ButtonProps) {
  return <Button {...props} className="danger" />;
}
