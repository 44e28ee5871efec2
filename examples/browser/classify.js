// Classifies photographs with the folder web/ that `deit-models export MODEL web/ --format transformers.js` writes.

const MODEL = 'web'; // a folder beside this page
const DTYPE = 'fp32'; // or 'q8', the quantised network: a third of the download, nearly the same probabilities
const MAX_PIXELS = 4e6; // the browser reduces larger photographs to this: 12 bytes of memory a pixel

const [field, hint, preview, input, status, classes, time] = ['field', 'hint', 'preview', 'photo', 'status', 'classes', 'time']
  .map((id) => document.getElementById(id));

function say(text, kind = '') {
  status.textContent = text;
  status.className = kind;
}

async function load() {
  const { env, pipeline, RawImage } = await import('@huggingface/transformers');
  const library = new URL('./', import.meta.resolve('@huggingface/transformers'));
  if (library.origin === location.origin) env.backends.onnx.wasm.wasmPaths = library.href; // else the library's own CDN
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = new URL('./', location.href).pathname;
  env.useBrowserCache = false; // the browser's own cache notices a new export
  const classify = await pipeline('image-classification', MODEL, {
    dtype: DTYPE,
    device: 'wasm',
    progress_callback: ({ status: step, file, progress }) => {
      if (step === 'progress') say(`Loading ${file}: ${Math.round(progress)} %`);
    },
  });
  if (classify.model.config.problem_type === 'multi_label_classification') {
    throw new Error('this page shows models with one class an image, and this one gives several');
  }
  return { classify, RawImage };
}

const loaded = load();
loaded.then(
  () => say('Ready.'),
  (error) => say(`The model cannot be loaded from the folder ${MODEL}/: ${error.message}`, 'error'),
);

// Upright, over white where it is transparent, as `Classifier` has it
async function pixelsOf(file, RawImage) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (bitmap.width * bitmap.height)));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height).getContext('2d');
  canvas.fillStyle = 'white';
  canvas.fillRect(0, 0, width, height);
  canvas.imageSmoothingQuality = 'high';
  canvas.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return new RawImage(canvas.getImageData(0, 0, width, height).data, width, height, 4).rgb();
}

function row({ label, score }) {
  const item = document.createElement('li');
  const [name, share, track, bar] = ['span', 'span', 'div', 'div'].map((tag) => document.createElement(tag));
  name.textContent = label;
  share.textContent = `${(100 * score).toFixed(1)} %`;
  bar.style.width = `${100 * score}%`;
  track.append(bar);
  item.append(name, share, track);
  return item;
}

let latest = 0; // a second photograph may be chosen before the first is done

async function show(file) {
  const turn = ++latest;
  classes.replaceChildren();
  time.textContent = '';
  say('Reading the photograph ...');
  preview.hidden = true;
  hint.hidden = false;
  const { classify, RawImage } = await loaded;
  if (turn !== latest) return;
  let image;
  try {
    image = await pixelsOf(file, RawImage);
  } catch {
    if (turn === latest) say(`${file.name}: not an image that this browser can read`, 'error');
    return;
  }
  if (turn !== latest) return;
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = false;
  hint.hidden = true;
  say('Classifying ...');
  await new Promise((resolve) => setTimeout(resolve, 30)); // the page is drawn before the network takes the thread
  const start = performance.now();
  try {
    const found = await classify(image, { top_k: 5 });
    if (turn !== latest) return;
    say(found[0].label, 'result');
    classes.replaceChildren(...found.map(row));
    time.textContent = `${Math.round(performance.now() - start)} ms on this device, ${image.width} x ${image.height} pixels`;
  } catch (error) {
    if (turn === latest) say(`${file.name} cannot be classified: ${error.message}`, 'error');
  }
}

input.addEventListener('change', () => {
  if (input.files.length) show(input.files[0]);
  input.value = ''; // the same file may be chosen again
});
for (const type of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  document.addEventListener(type, (event) => {
    event.preventDefault(); // the browser would leave the page for the file
    field.classList.toggle('over', ['dragenter', 'dragover'].includes(type));
    if (type === 'drop' && event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
  });
}
document.addEventListener('paste', (event) => {
  if (event.clipboardData.files.length) show(event.clipboardData.files[0]);
});
