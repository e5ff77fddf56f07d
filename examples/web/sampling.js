// Sampling with an ONNX denoiser, dense or wrapped. No DOM here: a page runs it with onnxruntime-web, Node with onnxruntime-node.

/**
 * A denoiser that is called with its inputs alone: what a wrapped file gives as `present_*`, it is handed as `past_*` at the
 * next call. A dense file has neither, and is called in the same way.
 */
export class Denoiser {
  #session;
  #Tensor;
  #past = {};

  /**
   * @param session an InferenceSession
   * @param Tensor the runtime's class of that name
   */
  constructor(session, Tensor) {
    this.#session = session;
    this.#Tensor = Tensor;
    this.reset();
  }

  /** Forget all images: a past of zeros is of none. Sizes that a file leaves open may be any, so they are 1. */
  reset() {
    this.#past = {};
    for (const { name, shape } of this.#session.inputMetadata) {
      if (!name.startsWith("past_")) continue;
      const sizes = shape.map((size) => (typeof size === "number" ? size : 1));
      const zeros = new Float32Array(sizes.reduce((product, size) => product * size, 1));
      this.#past[name] = new this.#Tensor("float32", zeros, sizes);
    }
  }

  /** The denoiser's output. */
  async call(inputs) {
    const found = await this.#session.run({ ...inputs, ...this.#past });
    for (const name of Object.keys(this.#past)) {
      this.#past[name] = found[name.replace("past_", "present_")];
    }
    const [output] = this.#session.outputNames.filter((name) => !name.startsWith("present_"));
    return found[output];
  }

  /** How many calls of the first sample's images computed, as the file's clock has it; null where there is no clock. */
  computed(column) {
    const clock = this.#past.past_clock;
    if (!clock) return null;
    const [, streams, width] = clock.dims;
    let sum = 0;
    for (let stream = 0; stream < streams; stream++) sum += clock.data[stream * width + column];
    return sum;
  }
}

/**
 * Integrate the flow from noise to images with Euler's method, as diffusers' FlowMatchEulerDiscreteScheduler does.
 *
 * @param denoiser a Denoiser
 * @param Tensor the runtime's class of that name
 * @param table what make.py wrote: timesteps, step sizes, shape of the noise, labels, the clock's column
 * @param noise Float32Array; is left as it is
 * @param onStep called after each step with its number, whether it computed, and the latents; may be async, and is not timed
 * @returns images, which steps computed, and the milliseconds that the calls took
 */
export async function sample(denoiser, Tensor, table, noise, onStep = () => {}) {
  const { timesteps, sizes, shape, labels, clock } = table;
  const latents = Float32Array.from(noise);
  const class_labels = new Tensor("int64", BigInt64Array.from(labels, BigInt), [labels.length]);
  const computes = [];
  let milliseconds = 0;
  let count = 0;
  denoiser.reset();
  for (const [step, time] of timesteps.entries()) {
    const inputs = {
      hidden_states: new Tensor("float32", latents.slice(), shape),
      timestep: new Tensor("float32", new Float32Array(labels.length).fill(time), [labels.length]),
      class_labels,
    };
    const started = performance.now();
    const { data } = await denoiser.call(inputs);
    milliseconds += performance.now() - started;
    for (let k = 0; k < latents.length; k++) latents[k] += Math.fround(sizes[step] * data[k]);
    const now = denoiser.computed(clock.computed);
    computes.push(now === null || now > count);
    count = now ?? 0;
    await onStep(step, computes[step], latents);
  }
  return { images: latents, computes, milliseconds };
}

/** How far images are from others: the largest difference, and the PSNR in dB, for pixels in [-1, 1]. */
export function compare(images, others) {
  let largest = 0;
  let sum = 0;
  images.forEach((value, k) => {
    const difference = Math.abs(value - others[k]);
    largest = Math.max(largest, difference);
    sum += difference * difference;
  });
  return { largest, psnr: 10 * Math.log10(4 / (sum / images.length)) };
}

/** Standard normal numbers, by Box and Muller. */
export function drawNoise(count) {
  return Float32Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - Math.random()));
    return radius * Math.cos(2 * Math.PI * Math.random());
  });
}
