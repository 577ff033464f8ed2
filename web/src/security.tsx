export function SecurityPage() { return <p>…</p>; }
