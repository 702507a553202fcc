// Numbers and tokens as people read them.

/** A probability as per cent, with as many digits as carry meaning. */
export function percent(probability) {
  if (probability >= 0.9995) return "100%";
  if (probability >= 0.995) return `${(probability * 100).toFixed(1)}%`;
  if (probability >= 0.1) return `${(probability * 100).toFixed(0)}%`;
  if (probability >= 0.001) return `${(probability * 100).toFixed(1)}%`;
  return probability > 0 ? "<0.1%" : "0%";
}

/** A span of time in seconds. */
export function duration(seconds) {
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** A whole number with its unit, which takes an s where there are several. */
export function count(number, unit) {
  return `${number.toLocaleString("en")} ${unit}${number === 1 ? "" : "s"}`;
}

/** A count of parameters: 135M, 1.2B. */
export function size(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(1)}B`;
  if (number >= 1e6) return `${(number / 1e6).toFixed(number < 1e7 ? 1 : 0)}M`;
  return number >= 1e3 ? `${(number / 1e3).toFixed(0)}K` : String(number);
}

/** The text of a token with its spaces and line breaks made visible. */
export function visible(text) {
  if (text === "") return "∅";
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}

/** The text of a token between quotation marks, for sentences. */
export function quoted(text) {
  return `“${visible(text)}”`;
}
