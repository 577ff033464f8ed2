/** Light or dark: as the system has it, unless the person says otherwise on this machine. */
export type Theme = "system" | "light" | "dark";

const key = "coaphub.theme";

export function theme(): Theme {
  const t = localStorage.getItem(key);
  return t === "light" || t === "dark" ? t : "system";
}

export function setTheme(t: Theme): void {
  if (t === "system") localStorage.removeItem(key);
  else localStorage.setItem(key, t);
  apply();
}

export function apply(): void {
  const t = theme();
  document.documentElement.style.colorScheme = t === "system" ? "light dark" : t;
}
