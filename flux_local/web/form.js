// The form, made from the server's own parameter table (`/v1/models/…?schema=true`).

import { el } from "./dom.js";

const MAIN = ["aspect_ratio", "resolution", "strength", "n", "seed"];
const ELSEWHERE = new Set(["prompt", "image", "mask", "model", "stream", "response_format", "sync_mode"]);
const OTHER_NAMES = new Set(["megapixels", "lora_weights", "lora_scale", "disable_safety_checker", "output_quality"]);
const PREVIEWS = 3; // partial pictures, unless the form says otherwise

export class Form {
  constructor(parameters, prompt, main, more) {
    this.prompt = prompt;
    this.fields = new Map();
    this.rows = parameters.filter(
      (row) => !ELSEWHERE.has(row.name) && !OTHER_NAMES.has(row.name) && row.handling !== "accepted",
    );
    for (const row of this.rows) {
      const isMain = MAIN.includes(row.name);
      const field = control(row);
      field.input.name = row.name;
      this.fields.set(row.name, field);
      (isMain ? main : more).append(field.label);
    }
    main.append(...MAIN.map((name) => this.fields.get(name)?.label).filter(Boolean));
    for (const name of ["aspect_ratio", "resolution"]) { // which an exact size would win over
      this.fields.get(name).input.addEventListener("change", () => (this.fields.get("size").input.value = ""));
    }
  }

  /** Shows what a kind of request takes: `generations` or `edits`. */
  show(mode) {
    for (const row of this.rows) {
      const { label, input } = this.fields.get(row.name);
      label.hidden = input.disabled = !row.modes.includes(mode);
      if (!row.examples) continue;
      // An edit's size is the picture's, and so the usual default is a choice of its own there.
      input.options[0].text = mode === "edits" ? "the picture's" : row.default;
      const usual = [...input.options].find((option) => option.value === row.default);
      usual.hidden = usual.disabled = mode !== "edits";
      if (usual.selected && usual.disabled) input.value = "";
    }
  }

  /** What is to be sent: whatever is not at its default, typed. Throws a Problem that names the field. */
  values() {
    const found = { prompt: this.prompt.value };
    for (const row of this.rows) {
      const { input } = this.fields.get(row.name);
      if (input.disabled) continue;
      if (!input.checkValidity()) throw new Problem(`${title(row)}: ${input.validationMessage}`, row.name);
      if (input.value.trim() === "") continue; // no sooner: what is no number reads as empty
      found[row.name] = typed(row, input.value.trim());
    }
    return found;
  }

  /** Sets the fields to what drew one picture of an entry of the history. */
  fill(params, seed) {
    const known = {
      seed: Number.isSafeInteger(seed) ? seed : null, n: 1, size: params.delivered, num_inference_steps: params.steps,
      cfg_scale: params.guidance, max_sequence_length: params.max_length, enable_safety_checker: params.check,
      output_compression: params.output_quality,
      loras: params.loras?.map(([name, scale]) => `${name}:${scale}`).join(", "),
    };
    this.prompt.value = params.prompt;
    for (const row of this.rows) {
      const value = row.name in known ? known[row.name] : params[row.name];
      const isDefault = value === undefined || value === null || value === row.default;
      this.fields.get(row.name).input.value = isDefault ? "" : String(value);
    }
    for (const name of ["aspect_ratio", "resolution"]) this.fields.get(name).input.value = "";
    this.fields.get("size").input.closest("details").open = true;
  }

  /** Marks the field that an error is about; null clears. */
  mark(param) {
    const names = new Map(this.rows.flatMap((row) => [row.name, ...row.aliases].map((name) => [name, row.name])));
    for (const [name, { input }] of this.fields) input.setAttribute("aria-invalid", name === names.get(param));
    this.prompt.setAttribute("aria-invalid", param === "prompt");
    const marked = param === "prompt" ? this.prompt : this.fields.get(names.get(param))?.input;
    const folded = marked?.closest("details");
    if (folded) folded.open = true;
    marked?.focus();
  }
}

export class Problem extends Error {
  constructor(message, param) {
    super(message);
    this.param = param;
  }
}

/** A request's own parameters and how it is to be answered to this page. */
export const streamed = (params) => ({ partial_images: PREVIEWS, ...params, stream: true, response_format: "url" });

const TITLES = {
  n: "Pictures", cfg_scale: "Guidance", num_inference_steps: "Steps", go_fast: "Fast (fp8)", loras: "LoRA",
  true_cfg_scale: "True CFG scale", enable_safety_checker: "Safety checker", partial_images: "Previews",
};
const PLACEHOLDERS = { partial_images: PREVIEWS, loras: "name, name:0.8, …", size: "1024x768", user: "", negative_prompt: "" };

function title(row) {
  const words = row.name.replaceAll("_", " ");
  return TITLES[row.name] ?? words[0].toUpperCase() + words.slice(1);
}

function control(row) {
  const shown = row.default_in_words.replaceAll("`", "");
  const choices = row.values ?? row.examples ?? (row.type === "boolean" ? ["true", "false"] : null);
  let input;
  if (choices) {
    const offered = choices.filter((choice) => (row.examples || choice !== row.default) && choice !== "jpg");
    const first = row.default === null ? shown : String(row.default);
    input = el("select", {}, ...[["", first], ...offered.map((c) => [c, c])].map(
      ([value, text]) => el("option", { value, text: text === "true" ? "yes" : text === "false" ? "no" : text }),
    ));
  } else if (row.type === "number" || row.type === "integer") {
    const placeholder = row.default === null ? shown : String(row.default);
    input = el("input", { type: "number", min: row.minimum, step: row.type === "integer" ? 1 : "any", placeholder });
    input.max = Math.min(row.maximum, Number.MAX_SAFE_INTEGER);
  } else {
    input = el("input", { type: "text", placeholder: shown });
    if (row.maximum) input.maxLength = row.maximum;
  }
  if (row.name in PLACEHOLDERS) input.placeholder = String(PLACEHOLDERS[row.name]);
  input.setAttribute("aria-description", row.description.replaceAll("`", ""));
  const wide = row.type === "string" && !choices && row.name !== "size";
  const label = el("label", { className: wide ? "field wide" : "field", title: row.description.replaceAll("`", "") },
    el("span", { textContent: title(row) }), input);
  return { label, input };
}

function typed(row, text) {
  switch (row.type) {
    case "boolean":
      return text === "true";
    case "integer":
    case "number":
      return Number(text);
    case "list":
      return text.split(",").map((part) => part.trim()).filter(Boolean).map((part) => {
        const [, path, scale] = /^(.*?)(?::(-?[\d.]+))?$/.exec(part);
        return scale === undefined ? { path } : { path, scale: Number(scale) };
      });
    default:
      return text;
  }
}
