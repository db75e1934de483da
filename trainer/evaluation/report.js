"use strict";
// The question browser. Its state is the address behind #, so that a view can be linked; every text goes in as text.
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("filters");
const NAMES = ["benchmark", "model", "probe", "verdict", "words"];
const START = { benchmark: "", model: "", probe: data.probes[0], verdict: "wrong", words: "" };
const ON_A_PAGE = 10;
const BADGES = { right: "✓ right", wrong: "✗ wrong", unparsed: "? unparsed" };
let first = 0; // of the questions that are on the page

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Control characters have no shape, their pictures do; half of a surrogate pair becomes U+FFFD.
const picture = (control) => String.fromCharCode(control === "\u007f" ? 0x2421 : 0x2400 + control.charCodeAt(0));
const visible = (text) => text.toWellFormed().replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, picture);

const block = (text, kind) => element("p", { class: `text ${kind}` }, visible(text));

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  const state = { ...START, verdict: given.size ? "" : START.verdict };
  for (const name of NAMES) {
    const value = given.get(name);
    const control = form.elements[name];
    if (value !== null && (!control.options || [...control.options].some((option) => option.value === value)))
      state[name] = value;
  }
  return state;
}

const isState = () => location.hash.includes("=");
const other = (question, model, probe) => question.answers.find((a) => a.model === model && a.probe === probe);
const isRight = (answer) => answer !== undefined && answer.verdict === "right";

function fits(answer, question, state) {
  if (answer.probe !== state.probe || (state.model && answer.model !== state.model)) return false;
  switch (state.verdict) {
    case "": return true;
    case "wrong": return answer.verdict !== "right";
    case "flipped": return isRight(answer) !== isRight(other(question, data.models[0], answer.probe));
    case "changed": return isRight(answer) !== isRight(other(question, answer.model, data.probes[0]));
    default: return answer.verdict === state.verdict;
  }
}

function hasWords(question, words, isId) {
  if (isId) return question.id === words;
  const texts = [question.key, ...question.prompt.map((m) => m.text), ...question.options];
  for (const answer of question.answers) texts.push(answer.think ?? "", answer.text);
  return texts.some((text) => text.toLowerCase().includes(words.toLowerCase()));
}

function choose(state) {
  const among = data.questions.filter((question) => !state.benchmark || question.benchmark === state.benchmark);
  const isId = among.some((question) => question.id === state.words);
  return among.filter((question) =>
    question.answers.some((answer) => fits(answer, question, state)) &&
    (!state.words || hasWords(question, state.words, isId)));
}

function showAnswer(answer, question) {
  const facts = [`${answer.tokens} tokens`];
  if (answer.rung !== null) facts.unshift(`read by: ${answer.rung}`);
  if (answer.finish === "length") facts.push("cut off");
  if (answer.recall !== null) facts.push(`recall ${answer.recall.toFixed(2)}`);
  if (answer.mmrp !== null) facts.push(`reasoning ${answer.mmrp.toFixed(2)} of 5`);
  const made = element("section", { class: `answer ${answer.verdict}` },
    element("h4", {}, answer.model, element("span", { class: `badge ${answer.verdict}` }, BADGES[answer.verdict]),
      element("small", {}, facts.join(" · "))));
  if (answer.think !== null) made.append(block(answer.think, "think"));
  made.append(block(answer.text, "said"));
  const before = answer.probe === data.probes[0] ? undefined : other(question, answer.model, data.probes[0]);
  if (before !== undefined)
    made.append(element("small", {}, `With its own image: ${BADGES[before.verdict]}, ${visible(before.said ?? "nothing read")}`));
  return made;
}

function showQuestion(question, state) {
  const left = element("div", {});
  question.images.forEach((place, i) => {
    const { url, problem } = data.images[place];
    left.append(url ? element("img", { src: url, alt: `image ${i + 1} of question ${question.id}` }) : block(problem, "note"));
  });
  for (const message of question.prompt) {
    const text = block(message.text, "role");
    text.dataset.role = message.role;
    left.append(text);
  }
  if (question.options.length) {
    const list = element("ol", { class: "options" });
    for (const option of question.options)
      list.append(option === question.key
        ? element("li", { class: "key" }, visible(option), " ", element("span", {}, "✓ key")) : element("li", {}, visible(option)));
    left.append(list);
  } else left.append(element("p", { class: "text" }, "Key: ", element("span", { class: "key" }, visible(question.key))));
  const right = element("div", {});
  for (const answer of question.answers) if (answer.probe === state.probe) right.append(showAnswer(answer, question));
  const about = [question.benchmark, ...Object.values(question.groups)].join(" · ");
  const address = "#" + new URLSearchParams({ benchmark: question.benchmark, probe: state.probe, words: question.id });
  return element("article", { "data-question": question.id },
    element("h3", {}, element("a", { href: address }, visible(question.id)), element("span", { class: "about" }, about)),
    element("div", { class: "case" }, left, right));
}

function show() {
  const state = readState();
  for (const name of NAMES) if (form.elements[name].value !== state[name]) form.elements[name].value = state[name];
  const found = choose(state);
  first = Math.min(first, Math.max(0, Math.ceil(found.length / ON_A_PAGE) - 1) * ON_A_PAGE);
  const page = found.slice(first, first + ON_A_PAGE);
  document.getElementById("list").replaceChildren(...page.map((question) => showQuestion(question, state)));
  const where = found.length > ON_A_PAGE ? `, ${first + 1} to ${first + page.length} below` : "";
  document.getElementById("count").textContent =
    `${found.length} of the ${data.questions.length} questions on this page${where}.`;
  document.getElementById("before").disabled = first === 0;
  document.getElementById("after").disabled = first + ON_A_PAGE >= found.length;
}

function turn(by) {
  first += by;
  show();
  form.scrollIntoView();
}

form.addEventListener("input", () => {
  location.replace("#" + new URLSearchParams(NAMES.map((name) => [name, form.elements[name].value])));
});
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("before").addEventListener("click", () => turn(-ON_A_PAGE));
document.getElementById("after").addEventListener("click", () => turn(ON_A_PAGE));
window.addEventListener("hashchange", () => {
  if (location.hash && !isState()) return; // a chapter
  first = 0;
  show();
  if (isState() && !form.contains(document.activeElement)) form.scrollIntoView();
});
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
show();
if (isState()) form.scrollIntoView();
