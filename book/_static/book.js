// Mark inline formulas wider than their paragraph, so that book.css lets them scroll instead of being cut off.
function markWideFormulas() {
  for (const formula of document.querySelectorAll(".bd-content mjx-container:not([display])")) {
    formula.classList.remove("wide");
    const block = formula.closest("p, li, td, dd, figcaption, div");
    if (block && formula.getBoundingClientRect().width > block.clientWidth) formula.classList.add("wide");
  }
}

window.addEventListener("load", () => {
  if (!window.MathJax?.startup?.promise) return;
  MathJax.startup.promise.then(markWideFormulas);
  window.addEventListener("resize", markWideFormulas);
  document.addEventListener("click", () => setTimeout(markWideFormulas, 0)); // a folded solution has no width
});
