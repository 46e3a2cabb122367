// --- commands --------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(code); // not allowed here: it is marked, and can be copied by hand
      button.textContent = "Marked";
    }
  });
}
draw();
document.body.dataset.ready = "yes";
