// Times lead to the player: links #t=SECONDS anywhere in the page, and places on the curve of Δ.
(() => {
  const video = () => document.querySelector("#mm-player video");
  const curve = () => document.querySelector(".mm-curve");

  const points = (element) => element.dataset.points.split(" ").map((point) => point.split(",").map(Number));

  function nearest(element, clientX) {
    const box = element.getBoundingClientRect();
    const all = points(element);
    const [first, last] = [all[0][0], all[all.length - 1][0]];
    const wanted = first + ((clientX - box.left) / box.width) * (last - first);
    return all.reduce((best, point) => (Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best));
  }

  const clock = (seconds) => {
    const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
    const pad = (number) => String(number).padStart(2, "0");
    return h ? `${h}:${pad(m)}:${pad(s)}` : `${m}:${pad(s)}`;
  };

  function place(seconds) {
    const element = curve();
    if (element) {
      const all = points(element);
      const [first, last] = [all[0][0], all[all.length - 1][0]];
      const head = element.querySelector(".mm-playhead");
      head.hidden = false;
      head.style.left = `${100 * Math.min(1, Math.max(0, (seconds - first) / (last - first || 1)))}%`;
    }
    const links = [...document.querySelectorAll(".mm-strip a")];
    const shown = links.filter((link) => Number(link.hash.slice(3)) <= seconds + 1e-3).pop();
    if (shown?.hasAttribute("aria-current")) return;
    for (const link of links) link.toggleAttribute("aria-current", link === shown);
    const strip = shown?.closest(".mm-strip");
    if (strip) strip.scrollLeft = shown.parentElement.offsetLeft - (strip.clientWidth - shown.offsetWidth) / 2;
  }

  function seek(seconds) {
    const player = video();
    if (player) {
      player.currentTime = seconds + 0.001; // rounding must not lead to the frame before
      player.scrollIntoView({ block: "nearest", behavior: "smooth" });
    }
    place(seconds);
  }

  document.addEventListener(
    "click",
    (event) => {
      const link = event.target.closest?.('a[href*="#t="]');
      const element = event.target.closest?.(".mm-curve");
      if (!link && !element) return;
      event.preventDefault();
      event.stopPropagation();
      seek(link ? Number(link.hash.slice(3)) : nearest(element, event.clientX)[0]);
    },
    true,
  );

  document.addEventListener("pointermove", (event) => {
    const element = curve();
    if (!element) return;
    const tip = element.querySelector(".mm-tip");
    tip.hidden = event.target.closest?.(".mm-curve") !== element;
    if (tip.hidden) return;
    const [time, delta] = nearest(element, event.clientX);
    tip.textContent = `${clock(time)} · Δ ${delta}`;
    const box = element.getBoundingClientRect();
    tip.style.left = `${Math.min(Math.max(0, event.clientX - box.left - tip.offsetWidth / 2), box.width - tip.offsetWidth)}px`;
  });

  // Events of media do not bubble, but they can be caught on their way down.
  document.addEventListener("timeupdate", (event) => event.target === video() && place(event.target.currentTime), true);
  document.addEventListener(
    "error",
    (event) => {
      if (event.target === video()) document.querySelector("#mm-player .mm-unplayable").hidden = false;
    },
    true,
  );
})();
