/** What is different between two values, to read. */
import { useMemo, useState } from "react";
import { diff } from "./diff";
import { named } from "./paths";
import { texts } from "./texts";
import { Button } from "./ui";
import { Brief } from "./value";
import { line } from "./visible";

const t = texts.device.diff;
const piece = 200;

export function Difference({ before, after }: { before: unknown; after: unknown }) {
  const { changes, more } = useMemo(() => diff(before, after, 2000), [before, after]);
  const [shown, setShown] = useState(piece);
  if (changes.length === 0) return <p className="loading">{t.same}</p>;
  return (
    <div className="scroll" tabIndex={0} role="region" aria-label={t.title}>
      <table className="difference">
        <thead><tr><th><span className="hidden">{t.kind}</span></th><th>{t.place}</th><th>{t.before}</th><th>{t.after}</th></tr></thead>
        <tbody>
          {changes.slice(0, shown).map((c) => (
            <tr key={c.path} className={c.kind}>
              <td><span aria-hidden="true">{c.kind === "added" ? "+" : c.kind === "removed" ? "−" : "≠"}</span><span className="hidden">{t[c.kind]}</span></td>
              <td><bdi>{line(named(c.path, t.all), 120)}</bdi></td>
              <td>{c.kind !== "added" && <del><Brief value={c.before} most={300} /></del>}</td>
              <td>{c.kind !== "removed" && <ins><Brief value={c.after} most={300} /></ins>}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {shown < changes.length ? <Button className="small" onPress={() => setShown(shown + piece)}>{texts.device.value.more(changes.length - shown)}</Button> : more && <p>{t.cut}</p>}
    </div>
  );
}
