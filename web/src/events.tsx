export function EventsPage() { return <p>…</p>; }
