// --- a node and what is around it ------------------------------------------------------------------------------------

const MOST_FOUND = 12;
const MOST_READERS = 12;
const MOST_BEHIND = 50;
const SIDE_WORDS = { before: "the original", after: "the result" };

const element = (name, className, ...parts) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...parts);
  return made;
};

// Letters are counted as Python counts them: one that JavaScript holds as two halves is one.
const unpackedNames = ({ names, rests }) => {
  const unpacked = [];
  let last = [];
  for (let index = 0; index < names.length; index += 2) {
    last = [...last.slice(0, names[index]), ...rests[names[index + 1]]];
    unpacked.push(last.join(""));
  }
  return unpacked;
};

const summed = (steps) => {
  let sum = 0;
  return steps.map((step) => (sum += step));
};

// The form of all this is told in the module that writes it.
const unpackedSide = (packed) => {
  const flat = packed.nodes;
  const nodes = [];
  const maker = new Map();
  const readers = new Map();
  let [place, name, met] = [0, 0, 0];
  const tensors = (count) =>
    Array.from({ length: count }, () => {
      const back = flat[place];
      place += 1;
      if (back === 0) met += 1;
      return back < 0 ? -1 : back === 0 ? met - 1 : met - back;
    });
  while (place < flat.length) {
    name += flat[place];
    const [op, ...counts] = packed.forms[flat[place + 1]];
    place += 2;
    const [inputs, outputs, captured] = counts.map(tensors);
    const node = { name, op, inputs, outputs, captured };
    for (const tensor of outputs) maker.set(tensor, node);
    for (const tensor of new Set([...inputs, ...captured])) {
      if (readers.has(tensor)) readers.get(tensor).push(node);
      else readers.set(tensor, [node]);
    }
    nodes.push(node);
  }
  maker.delete(-1);
  readers.delete(-1);
  const names = summed(packed.tensors);
  return {
    all: packed.all,
    nodes,
    maker,
    readers,
    names,
    types: packed.about.map((about) => about >> 1),
    constants: new Set(packed.about.flatMap((about, tensor) => (about & 1 ? [tensor] : []))),
    inputs: new Set(packed.inputs),
    outputs: new Set(packed.outputs),
    byName: new Map(nodes.map((node) => [node.name, node])),
    byTensor: new Map(names.map((number, tensor) => [number, tensor])),
  };
};

// Puts a button behind a layer's name that shows its node; nothing where the graphs have none of this name.
let graphButtons = () => [];

const graph = () => {
  if (!data.graph) return;
  const { ops, kinds, types } = data.graph;
  const names = unpackedNames(data.graph);
  const lower = names.map((name) => name.toLowerCase());
  const sides = { before: unpackedSide(data.graph.before), after: unpackedSide(data.graph.after) };
  const way = [];
  let here = null;

  const otherSide = (side) => (side === "before" ? "after" : "before");
  // The same node: of the same name, or else what writes the tensor of the same name.
  const twin = (side, node) => {
    const other = sides[otherSide(side)];
    const named = other.byName.get(node.name);
    if (named) return named;
    const first = node.outputs.find((tensor) => tensor >= 0);
    return first === undefined ? undefined : other.maker.get(other.byTensor.get(sides[side].names[first]));
  };

  const nodeButton = (side, node) => {
    const [op, kind] = ops[node.op];
    const button = element("button", `node kind-${kind}`, element("span", "operator", op), ...breakable(names[node.name]));
    button.type = "button";
    button.addEventListener("click", () => go(side, node));
    return button;
  };

  const role = (side, tensor) => {
    const { constants, inputs, outputs, types: kind } = sides[side];
    if (constants.has(tensor)) return types[kind[tensor]].endsWith("()") ? "constant" : "weight";
    return inputs.has(tensor) ? "input of the model" : outputs.has(tensor) ? "output of the model" : "";
  };

  const tensorLine = (side, tensor, before) => {
    const words = [before, role(side, tensor)].filter(Boolean).join(" ");
    return element("span", "tensor", words ? `${words}: ` : "", element("b", "", ...breakable(names[sides[side].names[tensor]])), ` ${types[sides[side].types[tensor]]}`);
  };

  const size = (tensor, side) => (types[sides[side].types[tensor]].match(/\d+(?=[,)])/g) || []).reduce((product, axis) => product * Number(axis), 1);

  // What is computed of constants alone, as a quantized or packed weight is, tells the largest that it comes from.
  const sources = (side, node) => {
    const { constants, maker } = sides[side];
    const behind = new Set([node]);
    const found = new Set();
    for (const one of behind) {
      for (const tensor of [...one.inputs, ...one.captured].filter((each) => each >= 0)) {
        if (constants.has(tensor)) found.add(tensor);
        else if (maker.has(tensor) && behind.size < MOST_BEHIND) behind.add(maker.get(tensor));
        else return [];
      }
    }
    if (!found.size) return [];
    const largest = Array.from(found).reduce((one, other) => (size(other, side) > size(one, side) ? other : one));
    return [tensorLine(side, largest, behind.size > 1 ? `through ${behind.size} nodes from` : "from")];
  };

  const producers = (side, node) => {
    const { maker } = sides[side];
    const rows = [...node.inputs.map((tensor) => [tensor, ""]), ...node.captured.map((tensor) => [tensor, "its body reads"])];
    return rows.filter(([tensor]) => tensor >= 0).map(([tensor, words]) => {
      const made = maker.get(tensor);
      return element("li", "", tensorLine(side, tensor, words), ...(made ? [nodeButton(side, made), ...sources(side, made)] : []));
    });
  };

  const consumers = (side, node) =>
    node.outputs.filter((tensor) => tensor >= 0).map((tensor) => {
      const all = sides[side].readers.get(tensor) || [];
      const list = element("ul", "");
      const add = (readers) => list.append(...readers.map((reader) => element("li", "", nodeButton(side, reader))));
      add(all.slice(0, MOST_READERS));
      if (all.length > MOST_READERS) {
        const more = element("button", "", `Show ${(all.length - MOST_READERS).toLocaleString("en")} more`);
        more.type = "button";
        more.addEventListener("click", () => {
          const next = list.children.length - 1;
          more.parentElement.remove();
          add(all.slice(MOST_READERS));
          list.children[next].querySelector("button").focus();
        });
        list.append(element("li", "", more));
      }
      return element("li", "", tensorLine(side, tensor, ""), ...(all.length ? [list] : []));
    });

  const column = (title, rows, none) => {
    const box = element("div", "", element("h4", "", title));
    box.append(rows.length ? element("ul", "", ...rows) : element("p", "hint", none));
    return box;
  };

  const wayButton = (text, act, name) => {
    const button = element("button", name, text);
    button.type = "button";
    button.addEventListener("click", act);
    return button;
  };

  const show = (side, node, { focus }) => {
    here = [side, node];
    byId("node-side").value = side;
    const [op, kind] = ops[node.op];
    const title = element("h4", "", ...breakable(names[node.name]));
    title.tabIndex = -1;
    const other = twin(side, node);
    const ways = element("div", "ways");
    if (other) ways.append(wayButton(`Show it in ${SIDE_WORDS[otherSide(side)]}`, () => go(otherSide(side), other), "twin"));
    if (way.length) ways.append(wayButton("Back", () => show(...way.pop(), { focus: true }), "back"));
    const words = other ? (ops[other.op][0] === op ? "" : ` It is a ${ops[other.op][0]} there.`) : ` It is not in ${SIDE_WORDS[otherSide(side)]}${sides[otherSide(side)].all > sides[otherSide(side)].nodes.length ? ", as far as this page has it" : ""}.`;
    const chosen = element("div", `chosen kind-${kind}`, title, element("p", "", `${op} (${kinds[kind]}), in ${SIDE_WORDS[side]}.${words}`), ways);
    const whole = element("div", "around", column("Reads", producers(side, node), "It reads nothing."), chosen, column("Is read by", consumers(side, node), "It writes nothing."));
    byId("around").replaceChildren(whole);
    if (focus) title.focus();
  };

  const go = (side, node) => {
    if (here) way.push(here);
    show(side, node, { focus: true });
  };

  const search = () => {
    const side = byId("node-side").value;
    const words = byId("node-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const { nodes, all } = sides[side];
    const fits = (node) => words.every((word) => lower[node.name].includes(word) || ops[node.op][0].toLowerCase().includes(word));
    const found = words.length ? nodes.filter(fits) : [];
    byId("node-found").replaceChildren(...found.slice(0, MOST_FOUND).map((node) => element("li", "", nodeButton(side, node))));
    const total = `${all.toLocaleString("en")} nodes of ${SIDE_WORDS[side]}`;
    const more = found.length > MOST_FOUND ? `; the first ${MOST_FOUND} are shown` : "";
    byId("node-count").textContent = words.length ? `${found.length.toLocaleString("en")} found in ${total}${more}` : total;
  };

  const numbers = new Map(names.map((name, number) => [name, number]));
  graphButtons = (label) => {
    const name = numbers.get(label.replace(/ \(in the (result|original) only\)$/, ""));
    const side = ["after", "before"].find((one) => sides[one].byName.has(name));
    if (side === undefined) return [];
    const button = wayButton("in the graph", () => {
      go(side, sides[side].byName.get(name));
      byId("around").scrollIntoView({ block: "center" });
    }, "to-graph");
    button.setAttribute("aria-label", `Show ${label} in the graph`);
    return [button];
  };

  byId("node-search").addEventListener("input", search);
  byId("node-side").addEventListener("change", search);
  byId("node-tools").addEventListener("submit", (event) => event.preventDefault());
  search();
  const first = sides.after.nodes.find((one) => ops[one.op][1] === 0) || sides.after.nodes[0];
  if (first) show("after", first, { focus: false });
};
graph();
