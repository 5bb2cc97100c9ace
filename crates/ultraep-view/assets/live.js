// Follows a run at work: says when there is something new.

let source = null;

// Calls `changed(event)` at most once a second for recording `index`, from now on for this one alone; stops by itself when
// nothing more will come.
export function follow(index, changed) {
  stop();
  const own = new EventSource(`/api/recordings/${index}/events`);
  source = own;
  let waiting = null;
  let last = null;
  own.onmessage = (message) => {
    last = JSON.parse(message.data);
    if (waiting === null) {
      waiting = setTimeout(() => {
        waiting = null;
        if (source === own) changed(last);
      }, 1000);
    }
    if (!last.is_live) own.close();
  };
}

export function stop() {
  if (source) source.close();
  source = null;
}
