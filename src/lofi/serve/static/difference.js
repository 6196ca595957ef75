// Which words of one text are not in another, by the longest common subsequence of words. Knows no view.

const MOST = 4_000_000;  // cells of the table: two texts of 2,000 words

export const words = (text) => text.split(/(\s+)/).filter((piece) => piece !== "");

/** {pieces: [[text, isNew]], count, total} of `text` against `reference`; null where both are too long to compare. */
export function difference(reference, text) {
  const ours = words(text);
  const theirs = words(reference).filter((piece) => piece.trim());
  const at = ours.map((piece, i) => (piece.trim() ? i : -1)).filter((i) => i >= 0);
  if (at.length * theirs.length > MOST) return null;
  const kept = shared(at.map((i) => ours[i]), theirs);
  const fresh = new Set(at.filter((_, i) => !kept.has(i)));
  return { pieces: ours.map((piece, i) => [piece, fresh.has(i)]), count: fresh.size, total: at.length };
}

/** The indices of `a` that are part of a longest common subsequence with `b`. */
function shared(a, b) {
  const width = b.length + 1;
  const table = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const here = i * width + j;
      table[here] = a[i] === b[j] ? table[here + width + 1] + 1 : Math.max(table[here + width], table[here + 1]);
    }
  }
  const kept = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { kept.add(i); i++; j++; }
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
}
