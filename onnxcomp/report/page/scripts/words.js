"use strict";
// Everything that is shown comes out of the JSON in #data, and is put in as text: nothing in it is read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// --- numbers in words ------------------------------------------------------------------------------------------------

const scaled = (value, units) => {
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2;
  return value.toFixed(digits) + units[unit];
};
const INFINITE = 1e305; // an error of which no number is left
const percent = (value) => (value >= INFINITE ? "infinite" : value === 0 ? "0%" : value < 1e-4 ? "<0.01%" : `${(100 * value).toFixed(2)}%`);
const WORDS = {
  bytes: (value) => scaled(value, [" B", " kB", " MB", " GB", " TB"]),
  count: (value) => scaled(value, ["", " k", " M", " G", " T"]),
  share: (value) => `${(100 * value).toFixed(1)}%`,
  error: percent,
  decibels: (value) => `${value.toFixed(1)} dB`,
  time: (value) => (value === 0 ? "0 ms" : value < 0.1 ? `${Number((1000 * value).toPrecision(3))} \u00b5s` : `${Number(value.toPrecision(3))} ms`),
  bits: (value) => String(Number(value.toPrecision(3))),
  whole: String,
};

// Names of nodes are paths: lines may break behind a slash before they break anywhere.
const breakable = (text) => text.split(/(?<=[/.])/).flatMap((part) => [part, document.createElement("wbr")]);
