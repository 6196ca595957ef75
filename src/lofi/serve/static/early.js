// Runs before the first paint: the remembered appearance and language, so that nothing flashes.
"use strict";
(() => {
  const stored = (name) => {
    try { return localStorage.getItem(name); } catch { return null; }  // storage may be switched off
  };
  const theme = stored("lofi.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  const language = stored("lofi.language") ?? navigator.language;
  document.documentElement.lang = language.toLowerCase().startsWith("vi") ? "vi" : "en";
})();
