/** The frame around the pages: navigation, who is signed in, and what is wrong with the connection. */
import { Link, Outlet, useRouterState } from "@tanstack/react-router";
import { useEffect, useState } from "react";
import { Menu, MenuItem, MenuTrigger, Popover } from "react-aria-components";
import { useApp, useLink } from "./api";
import { texts } from "./texts";
import { setTheme, theme, type Theme } from "./theme";
import { Button, Choice } from "./ui";

const pages = [
  ["/", texts.nav.devices, "read"], ["/events", texts.nav.events, "read"], ["/security", texts.nav.security, "read"], ["/system", texts.nav.system, "read"],
] as const;

export function Shell() {
  const { session } = useApp();
  const path = useRouterState({ select: (s) => s.location.pathname });
  useEffect(() => {
    document.getElementById("content")?.scrollTo(0, 0);
  }, [path]);
  return (
    <>
      <a className="skip" href="#content">{texts.skip}</a>
      <header className="top">
        <Link to="/" className="brand"><img src="/console/icon.svg" alt="" width="24" height="24" /> {texts.name}</Link>
        <nav aria-label={texts.nav.label}>
          {pages.filter(([, , scope]) => session.may(scope)).map(([to, text]) => (
            <Link key={to} to={to} activeOptions={{ exact: to === "/" }} activeProps={{ "aria-current": "page" }}>{text}</Link>
          ))}
        </nav>
        {session.may("write") && <Link to="/add" className="button primary">{texts.nav.add}</Link>}
        <Account />
      </header>
      <Banner />
      <main id="content" tabIndex={-1}><Outlet /></main>
    </>
  );
}

function Account() {
  const { session } = useApp();
  const [colours, setColours] = useState<Theme>(theme());
  return (
    <div className="account">
      <Choice
        label={texts.theme.label} hidden value={colours} onChange={(t) => { setTheme(t); setColours(t); }}
        options={[["system", texts.theme.system], ["light", texts.theme.light], ["dark", texts.theme.dark]]}
      />
      <MenuTrigger>
        <Button className="small" aria-label={`${texts.account.signedInAs} ${session.user}`}>{session.user}</Button>
        <Popover>
          <Menu onAction={() => void session.signOut()}><MenuItem id="out">{texts.account.signOut}</MenuItem></Menu>
        </Popover>
      </MenuTrigger>
    </div>
  );
}

/** What is wrong, where everybody sees it; pages mark what they show as old by the class of the document. */
function Banner() {
  const { session, live } = useApp();
  const { link, state } = useLink();
  // Something is listened to on every page, so that each notices when the hub or the session is gone.
  useEffect(() => live.subscribe({ eventFilter: ["UNREGISTERED"] }, { told: () => undefined }), [live]);
  useEffect(() => {
    document.documentElement.classList.toggle("stale", link === "lost");
  }, [link]);
  if (state === "expired")
    return (
      <div className="banner" role="alert">
        <strong>{texts.account.expired}</strong> {texts.account.expiredMore} <Button onPress={() => void session.signInAgain()}>{texts.account.again}</Button>
      </div>
    );
  return <div role="status">{link === "lost" && <div className="banner">{texts.link.lost}</div>}</div>;
}
