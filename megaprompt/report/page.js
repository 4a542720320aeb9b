// Links to the parts of the page, and boxes that are a stop for the keyboard only where they scroll.
const parts = [...document.querySelectorAll("main h2")].map((heading, place) => {
  heading.id ||= `part-${place + 1}`;
  const item = document.createElement("li"), link = document.createElement("a");
  link.href = `#${heading.id}`;
  link.append(heading.textContent);
  item.append(link);
  return item;
});
if (parts.length > 3) {
  const nav = document.createElement("nav"), list = document.createElement("ul");
  nav.setAttribute("aria-label", "Parts of this page");
  list.append(...parts);
  nav.append(list);
  document.querySelector("main h2").before(nav);
}

const boxes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const box = target.closest(".scroll");
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
});
for (const box of document.querySelectorAll(".scroll")) {
  boxes.observe(box);
  for (const inside of box.children) boxes.observe(inside);
}
