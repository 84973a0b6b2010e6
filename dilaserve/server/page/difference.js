// What two answers do not share, word by word.

const MOST = 1500; // words of an answer that are compared

const words = (text) => text.match(/\s+|[^\s]+/g)?.slice(0, MOST) ?? [];

/** Both texts as parts `{ text, shared }`; the shared ones are a longest common subsequence of words. */
export function compare(left, right) {
  const [a, b] = [words(left), words(right)];
  const length = lengths(a, b);
  const parts = [[], []];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      parts[0].push({ text: a[i++], shared: true });
      parts[1].push({ text: b[j++], shared: true });
    } else if (j >= b.length || (i < a.length && length[i + 1][j] >= length[i][j + 1])) {
      parts[0].push({ text: a[i++], shared: false });
    } else {
      parts[1].push({ text: b[j++], shared: false });
    }
  }
  return parts;
}

/** Of the rests from each pair of places: the length of their longest common subsequence. */
function lengths(a, b) {
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  return table;
}

export const changedWords = (parts) => parts.filter((part) => !part.shared && part.text.trim()).length;
