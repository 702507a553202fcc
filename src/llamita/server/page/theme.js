// Light or dark, as chosen before; runs ahead of the first paint, so it is no module.
try {
  const theme = localStorage.getItem("llamita.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the page follows the system.
}
