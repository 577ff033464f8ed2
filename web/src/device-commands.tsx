/** Commands of a device that wait, and those that ended while the page was open. */
import { useApp } from "./api";
import { Cancel } from "./device-order";
import type { Picture } from "./device-store";
import { texts } from "./texts";
import { Moment } from "./ui";
import { Brief } from "./value";
import { line } from "./visible";

const t = texts.device.commands;

export function Commands({ deviceId, picture }: { deviceId: string; picture: Picture }) {
  const { session } = useApp();
  return (
    <>
      <section className="card" aria-labelledby="waiting">
        <h2 id="waiting">{t.waiting}</h2>
        {picture.waiting.length === 0 ? <p className="loading">{t.none}</p> : (
          <div className="scroll" tabIndex={0} role="group" aria-label={t.waiting}>
            <table>
              <thead><tr><th>{t.what}</th><th>{t.resource}</th><th>{t.content}</th><th>{t.by}</th><th>{t.since}</th><th>{t.until}</th><th><span className="hidden">{texts.actions}</span></th></tr></thead>
              <tbody>
                {picture.waiting.map((c) => (
                  <tr key={c.id}>
                    <td>{c.twin ? t.twin[c.twin] : t.verb[c.verb]}</td>
                    <td><bdi><code>{line(c.href, 80)}</code></bdi> {c.interface && <small>{line(c.interface, 40)}</small>}</td>
                    <td><Brief value={c.content} most={60} /></td>
                    <td>{line(c.user, 40)}</td>
                    <td><Moment at={c.since} /></td>
                    <td>{c.until > 0 ? <Moment at={c.until} /> : "–"}</td>
                    <td>{session.may("write") && <Cancel deviceId={deviceId} command={c} />}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        )}
      </section>
      {picture.ended.length > 0 && (
        <section className="card" aria-labelledby="ended">
          <h2 id="ended">{t.ended}</h2>
          <div className="scroll" tabIndex={0} role="group" aria-label={t.ended}>
            <table>
              <thead><tr><th>{t.what}</th><th>{t.resource}</th><th>{t.status}</th><th>{t.answer}</th><th>{t.by}</th><th>{t.at}</th></tr></thead>
              <tbody>
                {picture.ended.map((c) => (
                  <tr key={`${c.id} ${c.at}`}>
                    <td>{t.verb[c.verb]}</td>
                    <td><bdi><code>{line(c.href, 80)}</code></bdi></td>
                    <td className={["OK", "CREATED", "ACCEPTED", "NOT_MODIFIED"].includes(c.status) ? "good" : "bad"}>{texts.device.status[c.status] ?? c.status}</td>
                    <td><Brief value={c.content} most={60} /></td>
                    <td>{line(c.user, 40)}</td>
                    <td><Moment at={c.at} /></td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </section>
      )}
    </>
  );
}
