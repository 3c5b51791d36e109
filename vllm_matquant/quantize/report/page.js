"use strict";
// Sorts the table by the column whose heading is clicked; a second click turns the order round.
const body = document.querySelector("#layers tbody");
document.querySelectorAll("#layers thead button").forEach((button, column) => {
  let sign = column ? -1 : 1;
  button.addEventListener("click", () => {
    const value = (row) => Number(row.cells[column].dataset.value);
    body.append(...[...body.rows].sort((one, other) => sign * (value(one) - value(other))));
    sign = -sign;
  });
});
