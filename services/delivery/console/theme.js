// The chosen colour theme. A classic script in the head: it runs before the first paint, so that no page flashes.
(() => {
  const KEY = "tailrace.theme";
  const THEMES = ["system", "light", "dark"];

  const stored = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is forbidden: the choice lasts as long as the page
    }
  };

  let theme = THEMES.includes(stored()) ? stored() : "system";

  const apply = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const label = document.getElementById("theme-name");
    if (label) label.textContent = theme[0].toUpperCase() + theme.slice(1);
    document.getElementById("theme")?.setAttribute("aria-label", `Colour theme: ${theme}`);
  };

  const next = () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // as above
    }
    apply();
  };

  apply();
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", next);
  });
})();
