export function DevicePage() { return <p>…</p>; }
