// The page works without this file, but for the races.
//
// The servers run on ports of one host, so the browser sends them the same cookies; they allow each other's pages to
// call them (CORS). Which server gets a request is decided here, as a load balancer would: in turn.

const races = document.getElementById('races');
const origins = races.dataset.origins.split(' ');
const requests = Number(races.dataset.requests);
const late = Number(races.dataset.late);
const connections = 6; // what browsers have to one server
const names = { plain: 'Get and put', ours: 'etcdstore' };

let turn = 0;

function nextServer() {
  return origins[turn++ % origins.length];
}

// ask sends one request, with the fields of a form if it is a POST. It throws where the answer is not "OK".
async function ask(method, path, fields = {}, server = nextServer()) {
  const form = new URLSearchParams(fields);
  const get = method === 'GET';
  const answer = await fetch(server + path + (get ? `?${form}` : ''), {
    method,
    body: get ? undefined : form,
    credentials: 'include',
    signal: AbortSignal.timeout(30_000),
  });
  if (!answer.ok) {
    throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
  }
  return answer;
}

const post = (path, fields) => ask('POST', path, fields);
const get = async (path, fields) => (await ask('GET', path, fields)).json();

// A race runs on one store after the other, so that neither takes the other's time.

// start begins a race with a session. The browser has all its connections to the servers before the clock starts, or the
// store that runs first would pay for them.
async function start(store) {
  const { race } = await (await post(`/race/${store}/start`)).json();
  await Promise.all(numbers(1, connections * origins.length).map(() => get(`/race/${store}/user`)));
  return race;
}

async function storm(store, lane) {
  const race = await start(store);
  const began = performance.now();
  await Promise.all(numbers(1, requests).map((item) => add(store, lane, item)));
  return finish(store, race, lane, performance.now() - began);
}

// leaderStorm kills the leader when some of the requests are answered, some are under way and some are still to come.
async function leaderStorm(store, lane) {
  const race = await start(store);
  const began = performance.now();
  const some = Math.floor(requests / 3);
  const under = numbers(1, some).map((item) => add(store, lane, item));
  await Promise.any(under);
  const killed = post('/race/leader/kill');
  under.push(...numbers(some + 1, 2 * some).map((item) => add(store, lane, item)));
  try {
    await killed;
    under.push(...numbers(2 * some + 1, requests).map((item) => add(store, lane, item)));
    await Promise.all(under);
  } finally {
    lane.took = performance.now() - began;
    await post('/race/leader/restart');
  }
  return finish(store, race, lane, lane.took);
}

async function add(store, lane, item) {
  try {
    await post(`/race/${store}/add`, { item });
    lane.mark(item, 'answered');
  } catch {
    lane.mark(item, 'failed');
  }
}

async function finish(store, race, lane, ms) {
  const { kept, leases } = await get(`/race/${store}/result`, { race });
  const inSession = new Set(kept);
  for (const item of numbers(1, requests)) {
    if (inSession.has(item)) {
      lane.mark(item, 'kept');
    } else if (!lane.is(item, 'failed')) {
      lane.mark(item, 'lost');
    }
  }
  return { kept: kept.length, failed: lane.count('failed'), leases, time: ms };
}

async function logout(store, lane) {
  const race = await start(store);
  let saved = 0;
  const held = numbers(1, late).map(async (item) => {
    const answer = await post(`/race/${store}/late`, { race, item });
    const refused = answer.headers.get('X-Session') === 'gone';
    saved += refused ? 0 : 1;
    lane.mark(item, refused ? 'kept' : 'lost');
  });
  await ask('GET', '/race/held', { race });
  await post(`/race/${store}/logout`);
  await post('/race/release', { race });
  await Promise.all(held);
  const { user } = await get(`/race/${store}/user`);
  return { user, saved, refused: late - saved };
}

// Lane shows what a race does to one store.
class Lane {
  constructor(element) {
    this.element = element;
    this.store = element.dataset.store;
    this.cells = element.querySelector('.cells');
  }

  clear(size) {
    this.cells.replaceChildren(...numbers(1, size).map(() => document.createElement('i')));
    for (const figure of this.element.querySelectorAll('[data-field]')) {
      figure.textContent = '';
    }
    for (const bar of this.element.querySelectorAll('[data-bar]')) {
      bar.style.width = '0';
    }
    delete this.element.dataset.good;
  }

  mark(item, state) {
    this.cells.children[item - 1].className = state;
  }

  is(item, state) {
    return this.cells.children[item - 1].className === state;
  }

  count(state) {
    return this.cells.getElementsByClassName(state).length;
  }

  show(field, text) {
    this.element.querySelector(`[data-field="${field}"]`).textContent = text;
  }

  bar(field, share) {
    this.element.querySelector(`[data-bar="${field}"]`).style.width = `${100 * share}%`;
  }

  set busy(busy) {
    this.element.toggleAttribute('data-busy', busy);
  }

  set good(good) {
    this.element.dataset.good = good;
  }
}

// Each race: how it runs, how its result is shown, and what is said about it.

const stormTexts = {
  size: requests,
  show(lane, result, most) {
    lane.show('kept', result.kept);
    lane.show('failed', result.failed);
    lane.show('leases', result.leases);
    lane.show('time', duration(result.time));
    lane.bar('failed', result.failed / requests);
    lane.bar('leases', result.leases / Math.max(most('leases'), 1));
    lane.bar('time', result.time / most('time'));
    lane.good = result.kept === requests;
  },
  say: (name, { kept, failed }) =>
    `${name} kept ${kept} of ${requests} items${failed ? `; ${failed} requests failed` : ''}.`,
};

const experiments = {
  storm: { run: storm, ...stormTexts },
  leader: { run: leaderStorm, ...stormTexts },
  logout: {
    run: logout,
    size: late,
    show(lane, result) {
      lane.show('who', result.user ? 'Logged in again' : 'Stays logged out');
      lane.show('saved', result.saved);
      lane.show('refused', result.refused);
      lane.bar('saved', result.saved / late);
      lane.bar('refused', result.refused / late);
      lane.good = !result.user;
    },
    say: (name, { user }) =>
      user ? `With ${name.toLowerCase()}, ${user} is logged in again.` : `With ${name}, the session stays gone.`,
  },
};

async function runExperiment(section) {
  const experiment = experiments[section.id];
  const verdict = section.querySelector('.verdict');
  const lanes = [...section.querySelectorAll('.lane')].map((element) => new Lane(element));
  const results = new Map();
  lanes.forEach((lane) => lane.clear(experiment.size));
  delete section.dataset.broken;
  const pressed = document.activeElement; // a button that is disabled loses the focus
  enable(false);
  try {
    for (const lane of lanes) {
      verdict.textContent = `${names[lane.store]} is running.`;
      lane.busy = true;
      results.set(lane, await experiment.run(lane.store, lane));
      lane.busy = false;
      const most = (field) => Math.max(...[...results.values()].map((result) => result[field]));
      results.forEach((result, done) => experiment.show(done, result, most));
    }
    verdict.textContent = lanes.map((lane) => experiment.say(names[lane.store], results.get(lane))).join(' ');
    section.dataset.done = Number(section.dataset.done ?? 0) + 1;
  } catch (error) {
    console.error(error);
    verdict.textContent = 'The race broke off: a server did not answer as it should. Try again.';
    section.dataset.broken = '';
  } finally {
    lanes.forEach((lane) => (lane.busy = false));
    enable(true);
    if (document.activeElement === document.body) {
      pressed.focus({ preventScroll: true });
    }
  }
}

function enable(on) {
  for (const button of races.querySelectorAll('.go:not([data-never])')) {
    button.disabled = !on;
  }
}

for (const section of races.querySelectorAll('.race')) {
  section.querySelectorAll('.lane').forEach((element) => new Lane(element).clear(experiments[section.id].size));
  section.querySelector('.go').addEventListener('click', () => runExperiment(section));
}
enable(true);

// The cart: its forms work by themselves. Here they go to the servers in turn, and only the cart is replaced, so that
// what the races showed stays on the page. One goes after the other, so that the last answer is the latest.

let changes = Promise.resolve();

document.addEventListener('submit', (event) => {
  const form = event.target;
  if (!form.closest('#cart')) {
    return;
  }
  event.preventDefault();
  const path = new URL(form.action).pathname;
  const fields = new FormData(form);
  const pressed = name(event.submitter ?? form.querySelector('button'));
  changes = changes.then(() => changeCart(path, fields, pressed));
});

async function changeCart(path, fields, pressed) {
  const cart = document.getElementById('cart');
  const status = document.getElementById('cart-status');
  try {
    const answer = await ask('POST', path, fields);
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
    cart.replaceChildren(...page.getElementById('cart').childNodes);
    localTimes();
    refocus(cart, pressed);
    status.textContent = `In your cart: ${cart.querySelector('[data-field="count"]').textContent}.`;
  } catch (error) {
    console.error(error);
    status.textContent = 'That did not work. Try again.';
  }
}

// refocus gives the keyboard back to the button that was pressed, or to its neighbour if there is nothing left to press.
function refocus(cart, pressed) {
  const button = [...cart.querySelectorAll('button')].find((b) => name(b) === pressed);
  const neighbour = button?.closest('.stepper')?.querySelector('button:enabled');
  const target = (button?.disabled ? neighbour : button) ?? cart.querySelector('h2');
  target.focus({ preventScroll: true });
}

function name(button) {
  return button.getAttribute('aria-label') ?? button.textContent;
}

function localTimes() {
  for (const time of document.querySelectorAll('time')) {
    const format = { day: 'numeric', month: 'long', hour: '2-digit', minute: '2-digit' };
    time.textContent = new Date(time.dateTime).toLocaleString('en-GB', format);
  }
}

localTimes();

function numbers(first, last) {
  return Array.from({ length: last - first + 1 }, (_, i) => first + i);
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
