export function OnboardingPage() { return <p>…</p>; }
