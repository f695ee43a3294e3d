// A button that opens and closes all code of a page.
const folded = document.querySelectorAll("details.code"), title = document.querySelector("article h1")
if (folded.length && title) {
  const button = document.createElement("button")
  button.className = "unfold"
  button.textContent = "Show all code"
  button.onclick = () => {
    const open = button.textContent === "Show all code"
    folded.forEach(details => { details.open = open })
    button.textContent = open ? "Hide all code" : "Show all code"
  }
  title.before(button)
}

// What scrolls sideways can be scrolled by keyboard, and the search says what it is.
const SCROLLED = ".output, .definition, .formula, math, code, .md-typeset__scrollwrap"

function makeReachable() {
  for (const region of document.querySelectorAll(`article :is(${SCROLLED})`))
    if (region.scrollWidth > region.clientWidth && getComputedStyle(region).overflowX === "auto") region.tabIndex = 0
}

document.querySelector(".md-search")?.setAttribute("aria-label", "Search")
addEventListener("load", makeReachable)
addEventListener("resize", makeReachable)
document.addEventListener("toggle", makeReachable, true)                  // code that unfolds
