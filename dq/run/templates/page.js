// Enlarges images on click, and moves between the images of a table by arrow keys.
const dialog = document.getElementById("enlarged");
let current = null;
function show(button) {
  const image = button.querySelector("img");
  current = button;
  document.getElementById("enlarged-image").src = image.src;
  document.getElementById("enlarged-image").alt = image.alt;
  document.getElementById("enlarged-text").textContent = image.alt;
  if (!dialog.open) dialog.showModal();
}
function neighbor(button, key) {
  const cell = button.closest("td"), row = cell.parentElement;
  const rows = [...row.closest("table").querySelectorAll("tr")].filter((r) => r.querySelector(".zoom") && r.offsetParent);
  const inRow = (r) => [...r.querySelectorAll(".zoom")];
  const column = inRow(row).indexOf(button);
  if (key === "ArrowRight") return inRow(row)[column + 1];
  if (key === "ArrowLeft") return inRow(row)[column - 1];
  const other = rows[rows.indexOf(row) + (key === "ArrowDown" ? 1 : -1)];
  return other && inRow(other)[Math.min(column, inRow(other).length - 1)];
}
for (const table of document.querySelectorAll("table.gallery"))
  table.querySelectorAll(".zoom").forEach((button, i) => (button.tabIndex = i ? -1 : 0));
document.addEventListener("click", (event) => {
  const button = event.target.closest(".zoom");
  if (button) show(button);
  else if (event.target === dialog) dialog.close();
});
document.addEventListener("keydown", (event) => {
  const button = dialog.open ? current : document.activeElement.closest(".zoom");
  if (!button || !event.key.startsWith("Arrow")) return;
  const next = neighbor(button, event.key);
  if (!next) return;
  event.preventDefault();
  button.tabIndex = -1;
  next.tabIndex = 0;
  if (dialog.open) show(next);
  else next.focus();
});
dialog.addEventListener("close", () => current && current.focus());
