// Building and finding elements.

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

/** Build an element. Properties go to the element, `class`, `data-*`, `aria-*` and `role` to attributes. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Set text only where it differs, so that nothing is laid out or selected away for nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Return a function that runs `draw` once in the next animation frame, however often it was called. */
export function perFrame(draw) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}
