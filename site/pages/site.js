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
