// The items of test, which stand in the page as data: search them, choose by who is right, see all that was answered.
function browse(section) {
  const data = JSON.parse(document.getElementById("browse-data").textContent);
  const { words, methods, groups } = data, about = section.dataset;
  const part = (name) => document.getElementById(`browse-${name}`);
  const form = section.querySelector("form"), more = part("more"), kinds = part("kinds");
  const PAGE = 25, LETTERS = 240, COLUMNS = 5, narrow = matchMedia("(max-width: 60rem)");
  let found = [], shown = 0, folded = null;

  const make = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const table = make("table", { id: "browse-table", role: "table" });  // roles, as a small window shows cards
  const count = (number) => number.toLocaleString("en");
  const fold = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();  // Miloš is found as milos
  const clipped = (text, most) => (text.length > most ? `${text.slice(0, most)} …` : text);
  const inShort = (input) => {  // each of its texts, as the last one is often the question
    const texts = input.split(" | ");
    return input.length > LETTERS ? texts.map((text) => clipped(text, Math.max(60, LETTERS / texts.length))).join(" | ") : input;
  };
  const probability = (p) => (p < 0 ? "" : p === 0 ? "<0.1\u00a0%" : `${(p / 10).toFixed(1)}\u00a0%`);
  const placed = (rank) => `${about.gold}: rank ${count(rank)}`;
  const value = (name) => (part(name) ? part(name).value : "");
  const pair = () => (part("method-1") ? [Number(value("method-1")), Number(value("method-2"))] : [0, 0]);
  const single = () => groups.length === 1 || value("relation") !== "";
  const columns = () => (narrow.matches || methods.length > COLUMNS ? [...new Set(pair())] : [...methods.keys()]);

  function kindOf(item, [one, two]) {
    const first = methods[one].rank[item], second = methods[two].rank[item];
    if (first < 0 || second < 0) return "";  // not asked
    return first === 1 ? (second === 1 ? "both" : "first") : second === 1 ? "second" : "neither";
  }

  function nameKinds() {
    const [one, two] = pair().map((method) => methods[method].name);
    const alone = one === two, names = { all: "any", both: "both", first: `only ${one}`, second: `only ${two}`, neither: "neither" };
    if (alone) Object.assign(names, { both: `${one} is`, neither: `${one} is not` });
    const chosen = form.elements.kind ? form.elements.kind.value : "all";
    const labels = Object.entries(names).filter(([kind]) => !alone || !["first", "second"].includes(kind)).map(([kind, name]) => {
      const input = make("input", { type: "radio", name: "kind", value: kind });
      return make("label", {}, input, ` ${name} `, make("span", { class: "sure", id: `browse-count-${kind}` }));
    });
    kinds.replaceChildren(kinds.firstElementChild, ...labels);
    form.elements.kind.value = chosen;
    if (!form.elements.kind.value) form.elements.kind.value = "all";
  }

  function search() {
    const wanted = fold(value("text").trim()), relation = value("relation"), methods = pair(), kind = form.elements.kind.value;
    if (wanted && !folded) folded = words.map(fold);
    const hit = wanted ? folded.map((word) => word.includes(wanted)) : null;
    const counts = { all: 0, both: 0, first: 0, second: 0, neither: 0 };
    found = [];
    for (let item = 0; item < data.group.length; item++) {
      if (relation !== "" && data.group[item] !== Number(relation)) continue;
      if (hit && !hit[data.input[item]] && !hit[data.gold[item]]) continue;
      const its = kindOf(item, methods);
      counts.all++;
      if (its) counts[its]++;
      if (kind === "all" || kind === its) found.push(item);
    }
    for (const [name, number] of Object.entries(counts)) if (part(`count-${name}`)) part(`count-${name}`).textContent = count(number);
    section.classList.toggle("idle", !wanted && relation === "" && kind === "all");
    shown = 0;
    showHead();
    showMore();
  }

  function showHead() {
    const heads = [about.input, about.gold, ...(single() ? [] : [about.group]), ...columns().map((method) => methods[method].name)];
    const cells = heads.map((head) => make("th", { role: "columnheader", class: "text" }, head));
    const body = make("tbody", { role: "rowgroup" });
    table.replaceChildren(make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...cells)), body);
    table.hidden = !found.length;
  }

  function showMore() {
    const rows = found.slice(shown, shown + (shown ? 4 * PAGE : PAGE)).map(row);
    table.tBodies[0].append(...rows);
    shown += rows.length;
    const left = found.length - shown;
    more.hidden = !left;
    more.textContent = `Show ${count(Math.min(4 * PAGE, left))} more`;
    part("status").textContent = status();
    return rows;
  }

  function status() {
    const kind = form.elements.kind.value, name = kinds.querySelector("input:checked").parentElement.childNodes[1].textContent.trim();
    const chosen = [
      value("relation") === "" ? "" : `${about.group} ${groups[Number(value("relation"))]}`,
      kind === "all" ? "" : `right: ${name}`,
      value("text").trim() && `with “${value("text").trim()}”`,
    ].filter(Boolean).join("; ");
    const number = shown < found.length ? `${count(shown)} of ${count(found.length)}` : count(found.length);
    return `${number} ${about.item}${found.length === 1 ? "" : "s"}${chosen && `: ${chosen}`}`;
  }

  function row(item) {
    const input = words[data.input[item]], its = columns();
    const head = make("th", { role: "rowheader", scope: "row", class: "text wide" }, inShort(input));
    const gold = make("td", { role: "cell", class: "text words", "data-name": about.gold }, words[data.gold[item]]);
    const relation = make("td", { role: "cell", class: "text words", "data-name": about.group }, groups[data.group[item]]);
    const cells = its.map((method) => {
      const name = methods[method].name;
      return make("td", { role: "cell", class: "text said", "data-name": name }, ...answer(methods[method], item));
    });
    const line = make("tr", { role: "row" }, head, gold, ...(single() ? [] : [relation]), ...cells);
    const all = methods.some((method) => method.said[item].length > 2) || its.length < methods.length;
    if (all || input.length > LETTERS) {
      const button = make("button", { type: "button", class: "toggle", "aria-expanded": "false", "aria-label": `${all ? "All answers" : "Whole text"}: ${clipped(input, 60)}` });
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "false";
        button.setAttribute("aria-expanded", String(open));
        if (open) line.after(details(item, all, line.cells.length));
        else line.nextElementSibling.remove();
      });
      head.prepend(button);
    }
    return line;
  }

  function answer(method, item) {
    const rank = method.rank[item], [word, p] = method.said[item];
    if (rank < 0) return ["–", make("span", { class: "unseen" }, "not asked")];
    const right = rank === 1, name = right ? "right" : "wrong";
    const mark = make("span", { class: name }, make("span", { "aria-hidden": "true" }, right ? "✓" : "✗"), make("span", { class: "unseen" }, `${name}: `));
    const place = rank > 1 ? [make("br", {}), make("span", { class: "sure" }, placed(rank))] : [];
    return [mark, `\u00a0${words[word]} `, make("span", { class: "sure" }, probability(p)), ...place];
  }

  function details(item, all, width) {
    const blocks = methods.filter((method) => all && method.rank[item] >= 0).map((method) => {
      const said = method.said[item], list = make("ol", {});
      for (let place = 0; place < said.length; place += 2) {
        const isGold = said[place] === data.gold[item], p = said[place + 1];
        const line = make("li", { class: isGold ? "right" : "" }, `${words[said[place]]} `, make("span", { class: "sure" }, probability(p)));
        if (p > 0) line.append(make("span", { class: "bar", style: `width: ${p / 10}%` }));
        list.append(line);
      }
      const rank = method.rank[item], p = probability(method.gold[item]);
      const place = rank > 1 ? [make("span", { class: "sure" }, placed(rank) + (p && `, ${p}`))] : [];
      return make("div", {}, make("strong", {}, method.name), list, ...place);
    });
    const input = words[data.input[item]], whole = input.length > LETTERS ? [make("p", {}, input)] : [];
    const cell = make("td", { role: "cell", class: "text", colspan: width }, ...whole, make("div", { class: "answers" }, ...blocks));
    return make("tr", { role: "row", class: "details" }, cell);
  }

  let waiting = 0;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.id.startsWith("browse-method")) nameKinds();
    clearTimeout(waiting);
    waiting = setTimeout(search, event.target.type === "search" ? 150 : 0);
  });
  narrow.addEventListener("change", search);
  more.addEventListener("click", () => {
    const head = showMore()[0].cells[0];
    head.tabIndex = -1;
    head.focus();
  });
  part("instead").remove();
  section.hidden = false;
  part("box").append(table);
  nameKinds();
  search();
}

if (document.getElementById("browse")) browse(document.getElementById("browse"));
