"use strict";
// Several models asked side by side, and the critic's word on each answer. What models and users write comes in as
// text, never as HTML.
(() => {
  const $ = (id) => document.getElementById(id);
  const NAMES = { base: "base", sl: "SL-CAI", rl: "RL-CAI" };
  const MOST_WORDS = 1500; // of a text that is compared; a longer one is shown as it is
  let token = sessionStorage.getItem("token") ?? "";
  let known = null; // the server's constitution, as it was last asked
  let turns = []; // of the conversation: the answers to each prompt
  let stop = new AbortController(); // of all that is under way
  let running = 0;

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child));
    return element;
  };
  const text = (said, className = "body") => make("p", { className, dir: "auto" }, said.trim());
  const name = (model) => NAMES[model] ?? model;
  const by = ({ name, version, sha }) => make("small", {}, `${name} ${version} `, make("code", {}, sha));
  const share = (p) => make("span", { className: "share", title: "probability of being at stake" }, `p = ${p.toFixed(2)}`);
  const told = ({ name, message }) => (name === "AbortError" ? "Stopped." : message[0].toUpperCase() + message.slice(1));

  // The server.

  const ask = async (path, body) => {
    const { signal } = stop;
    const headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
    let answer;
    try {
      answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      throw signal.aborted ? error : new Error("the server does not answer");
    }
    if (answer.ok) return answer;
    const { error } = await answer.json().catch(() => ({}));
    if (answer.status === 401) signIn("The server does not accept this token. Enter another.");
    throw new Error(error?.message ?? `the server answered with status ${answer.status}`);
  };
  const json = async (path, body) => (await ask(path, body)).json();

  // Server-sent events, up to the one that says it was the last.
  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the answer was cut off; ask again");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.filter((line) => line.startsWith("data: "))) {
        if (line.startsWith("data: [DONE]")) return;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  }

  // What is chosen.

  const ticked = (id) => [...$(id).querySelectorAll("input:checked")].map((input) => input.value);
  const constitutions = () => (ticked("previous").length ? ["current", "previous"] : ["current"]);
  // Nothing narrows a request where the constitution's own choice of principles stands.
  const narrowed = () => {
    const chosen = ticked("principles");
    const usual = known.document.principles.filter((p) => p.enabled).map((p) => p.id);
    if (!chosen.length) throw new Error("no principle is switched on");
    return chosen.join() === usual.join() ? {} : { principles: chosen };
  };

  // One model's answer, with what the critic says of it.
  class Answer {
    constructor(model, messages) {
      Object.assign(this, { model, messages, text: "", streams: true, judged: 0 });
      this.card = $("answer").content.firstElementChild.cloneNode(true);
      this.card.classList.add(NAMES[model] ? model : "adapter");
      this.card.ariaLabel = `Answer of ${name(model)}`;
      for (const part of ["said", "fault", "verdicts", "more", "revised"]) this[part] = this.card.querySelector(`.${part}`);
      this.card.querySelector("h3").append(name(model));
      this.more.querySelector("button").addEventListener("click", () => during(() => this.revise()));
    }

    get message() {
      return { role: "assistant", content: this.text };
    }

    async stream() {
      try {
        const temperature = $("temperature").valueAsNumber;
        const body = { model: this.model, messages: this.messages, stream: true, temperature };
        for await (const { choices } of events(await ask("/v1/chat/completions", body))) {
          this.text += choices[0]?.delta?.content ?? "";
          this.said.textContent = this.text.trimStart();
        }
        if (!this.text.trim()) throw new Error("the answer is empty");
      } catch (error) {
        this.fault.textContent = told(error);
      }
      this.streams = false;
      this.said.ariaBusy = "false";
      this.more.hidden = !this.text.trim();
      show();
      if (!this.fault.textContent) await this.judge();
    }

    // Which principle is at stake, by each constitution. A later call's verdicts replace those of an earlier one.
    async judge() {
      const call = ++this.judged;
      this.verdicts.replaceChildren(text("The critic reads it.", "soft"));
      const each = (which) => this.critic("critique", { constitutions: [which] }, (found) => verdict(found, which));
      const found = await Promise.all(constitutions().map(each));
      if (call === this.judged) this.verdicts.replaceChildren(...found);
    }

    async revise() {
      const rounds = Number(this.more.querySelector("select").value);
      this.revised.replaceChildren(text("The critic revises it.", "soft"));
      const shown = await this.critic("revise", { rounds }, (found) => revision(this.text, found, rounds));
      this.revised.replaceChildren(shown);
    }

    // What the critic says, as an element; or why it does not.
    async critic(path, asked, shown) {
      try {
        const body = { messages: [...this.messages, this.message], ...asked, ...narrowed() };
        const found = await json(`/v1/${path}`, body);
        const current = asked.constitutions?.[0] !== "previous";
        if (current && found.constitution.sha !== known.constitution.sha) await learn(); // put in meanwhile
        return shown(found);
      } catch (error) {
        return text(told(error), "fault");
      }
    }
  }

  const verdict = ({ principle: top, p_at_stake, critique, principles, constitution }, which) => {
    const rows = principles.map(({ principle, at_stake, p_at_stake: p, critique }) =>
      make(
        "li",
        { className: at_stake ? "over" : "" },
        make("div", { className: "between" }, make("span", {}, principle.title), share(p)),
        make("meter", { min: 0, max: 1, value: p, ariaLabel: `Probability that ${principle.title} is at stake` }),
        text(critique),
      ),
    );
    const line = top ? `At stake: ${top.title} ` : "No principle is at stake ";
    return make(
      "div",
      { className: "verdict" },
      constitutions().length > 1 && make("small", {}, `The ${which} constitution`),
      make("p", { className: "stake" }, line, share(p_at_stake)),
      top && text(critique),
      make("details", {}, make("summary", {}, `All principles asked (${rows.length})`), make("ul", {}, ...rows)),
      by(constitution),
    );
  };

  const revision = (response, { steps, constitution }, rounds) => {
    const box = make("div", { className: "steps" });
    const step = (kind, head, ...parts) => box.append(make("div", { className: `step ${kind}` }, make("h4", {}, head), ...parts));
    let before = response;
    for (const { round, principle, p_at_stake, critique, revision } of steps) {
      const about = make("p", { className: "soft" }, `${principle.title} `, share(p_at_stake));
      step("critique", `Critique ${round}`, about, text(critique));
      const words = make("p", { className: "body diff", dir: "auto" }, ...diff(before.trim(), revision.trim()));
      step("revision", `Revision ${round}`, words);
      before = revision;
    }
    const end = steps.length ? "Then no principle is at stake." : "No principle is at stake: the answer stays.";
    if (steps.length < rounds) box.append(text(end, "soft"));
    if (steps.length) box.append(make("small", {}, "Struck through is what a revision takes out, underlined what it puts in."));
    box.append(by(constitution));
    return box;
  };

  // Two texts as one, word by word, by their longest common subsequence.
  const diff = (before, after) => {
    const [old, now] = [before, after].map((words) => words.match(/\S+\s*|\s+/g) ?? []);
    if (Math.max(old.length, now.length) > MOST_WORDS) return [after];
    const [gone, come] = [old, now].map((words) => words.map((word) => word.trim()));
    const common = [...old, ""].map(() => new Uint16Array(now.length + 1)); // of what is left from i and j on
    for (let i = old.length - 1; i >= 0; i--) {
      for (let j = now.length - 1; j >= 0; j--) {
        common[i][j] = gone[i] === come[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
      }
    }
    const parts = [];
    const put = (tag, word) => {
      if (parts.at(-1)?.localName !== tag) parts.push(make(tag));
      parts.at(-1).append(word);
    };
    let [i, j] = [0, 0];
    while (i < old.length || j < now.length) {
      if (i < old.length && gone[i] === come[j]) {
        put("span", now[j++]);
        i++;
      } else if (j === now.length || (i < old.length && common[i + 1][j] >= common[i][j + 1])) put("del", old[i++]);
      else put("ins", now[j++]);
    }
    return parts;
  };

  // The conversation.

  const streams = () => turns.flat().some((answer) => answer.streams);
  const say = (line) => ($("status").textContent = line);
  const show = () => {
    $("stop").ariaDisabled = String(!running);
    $("send").ariaDisabled = String(streams());
  };
  const during = async (work) => {
    running += 1;
    show();
    await work();
    running -= 1;
    show();
  };
  // A model reads its own answers alone; what it failed to answer it does not read.
  const history = (model) => {
    const own = turns.flat().filter((answer) => answer.model === model && answer.text.trim());
    return own.flatMap((answer) => [answer.messages.at(-1), answer.message]);
  };

  const send = async () => {
    const content = $("prompt").value;
    const models = ticked("models");
    if (!content.trim() || streams()) return;
    if (!models.length || !$("temperature").checkValidity()) {
      $("settings").open = true;
      say(models.length ? "Temperature is a number from 0 to 2." : "No model is chosen; choose one.");
      return;
    }
    const answers = models.map((model) => new Answer(model, [...history(model), { role: "user", content }]));
    turns.push(answers);
    const turn = make(
      "section",
      { className: "turn", ariaLabel: `Turn ${turns.length}` },
      make("div", { className: "asked" }, make("h2", {}, "You"), text(content)),
      make("div", { className: "answers" }, ...answers.map((answer) => answer.card)),
    );
    $("turns").append(turn);
    turn.scrollIntoView({ block: "start" });
    $("prompt").value = "";
    say(`Asked: ${models.map(name).join(", ")}.`);
    await during(() => Promise.all(answers.map((answer) => answer.stream())));
    if (turns.at(-1) === answers) say("");
  };
  const halt = () => {
    stop.abort();
    stop = new AbortController();
  };
  const anew = () => {
    halt();
    turns = [];
    $("turns").replaceChildren();
    say("A new conversation.");
    show();
    $("prompt").focus();
  };

  // The way in, and what the server has.

  const signIn = (line) => {
    $("trouble").textContent = line;
    $("sign-in").hidden = false;
    $("token").value = "";
    $("token").focus();
  };
  const enter = async () => {
    $("trouble").textContent = "";
    try {
      const [{ data }] = await Promise.all([json("/v1/models"), learn()]);
      sessionStorage.setItem("token", token);
      $("sign-in").hidden = true;
      if ($("desk").hidden) offer(data.map((card) => card.id));
      $("desk").hidden = false;
      $("prompt").focus();
    } catch (error) {
      $("trouble").textContent ||= told(error);
    }
  };
  const tick = (value, checked, ...label) =>
    make("label", { className: "tick" }, make("input", { type: "checkbox", value, checked }), make("span", {}, ...label));

  const offer = (models) => {
    const trained = ["rl", "sl"].find((model) => models.includes(model)) ?? models[0];
    for (const model of models) {
      const id = name(model) !== model && make("code", {}, ` ${model}`);
      $("models").append(tick(model, model === trained || model === "base", ...[name(model), id].filter(Boolean)));
    }
    const how = make("code", {}, `--models ${trained},base`);
    if (!models.includes("base")) $("models").append(make("p", { className: "soft" }, "The base model is served with ", how));
  };

  // The constitution as it is now. What a user switched stays so.
  const learn = async () => {
    known = await json("/v1/constitution");
    const [legend, ...earlier] = $("principles").children;
    const switched = new Map(earlier.flatMap((row) => [...row.querySelectorAll("input")]).map((input) => [input.value, input.checked]));
    const rows = known.document.principles.map(({ id, title, text: full, enabled }) => {
      const words = make("p", { className: "soft", dir: "auto", hidden: true }, full);
      const open = make("button", { type: "button", className: "plain", ariaExpanded: "false", ariaLabel: `Text of ${title}` }, "text");
      open.addEventListener("click", () => (open.ariaExpanded = String(!(words.hidden = !words.hidden))));
      return make("div", { className: "choice" }, tick(id, switched.get(id) ?? enabled, title), open, words);
    });
    $("principles").replaceChildren(legend, ...rows, by(known.constitution));
    const [before] = known.previous;
    const [box, label] = $("previous").children;
    $("previous").hidden = !before;
    box.checked &&= Boolean(before);
    if (before) label.replaceChildren("Beside the previous constitution, ", by(before));
  };

  // Keys and buttons.

  const on = (target, kind, act) => target.addEventListener(kind, act);
  on($("sign-in"), "submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    enter();
  });
  on($("composer"), "submit", (event) => {
    event.preventDefault();
    send();
  });
  on($("prompt"), "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  on($("stop"), "click", halt);
  on($("anew"), "click", anew);
  on($("settings"), "submit", (event) => event.preventDefault());
  on($("settings"), "change", (event) => {
    if (!event.target.closest("#principles, #previous")) return;
    const last = turns.at(-1)?.filter((answer) => answer.text.trim() && !answer.streams) ?? [];
    during(() => Promise.all(last.map((answer) => answer.judge())));
  });
  on(document, "keydown", (event) => {
    if (event.key === "Escape") halt();
    if (event.key !== "/" || event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    $("prompt").focus();
  });
  $("settings").open = matchMedia("(min-width: 60rem)").matches;
  if (!token && document.documentElement.dataset.token === "needed") signIn("");
  else enter();
})();
