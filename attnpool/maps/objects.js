// From which score on an object is shown, what became of each then; and the name of the one under the pointer.
for (const objects of document.querySelectorAll('.objects')) {
  const words = JSON.parse(objects.querySelector('script[type="application/json"]').textContent)
  const choice = objects.querySelector('.score'), range = choice.querySelector('input')
  const under = Object.assign(document.createElement('div'), {className: 'under', hidden: true})
  objects.append(under)
  choice.hidden = false

  function told(figure) {
    const counts = {}
    for (const o of figure.querySelectorAll('g:not([hidden])')) counts[o.classList[1]] = (counts[o.classList[1]] ?? 0) + 1
    return Object.entries(words).filter(([state]) => counts[state])
      .map(([state, [one, more]]) => `${counts[state]} ${counts[state] === 1 ? one : more}`).join(', ') || 'nothing'
  }
  function choose() {   // a truth is missed as long as nothing surer than this has found it
    const least = +range.value
    choice.querySelector('output').textContent = least.toFixed(2)
    for (const o of objects.querySelectorAll('[data-score]'))
      o.toggleAttribute('hidden', o.classList.contains('missed') === (+o.dataset.score >= least))
    for (const figure of objects.querySelectorAll('figure.said')) {
      figure.querySelector('span').textContent = told(figure)
      figure.querySelector('.stage').classList.toggle('many', figure.querySelectorAll('g:not([hidden])').length > 40)
    }
  }
  range.addEventListener('input', choose)
  objects.addEventListener('submit', e => e.preventDefault())

  function show(e) {
    const o = e.target.closest?.('g[data-name]')
    under.hidden = !o
    if (!o) return
    under.textContent = o.dataset.name + (words[o.classList[1]] && o.classList[1] !== 'plain' ? `, ${words[o.classList[1]][0]}` : '')
    const width = under.offsetWidth
    under.style.left = `${Math.max(4, Math.min(e.clientX + 12, innerWidth - width - 6))}px`
    under.style.top = `${e.clientY > 48 ? e.clientY - 34 : e.clientY + 22}px`
  }
  objects.addEventListener('pointermove', show)
  objects.addEventListener('pointerdown', show)
  objects.addEventListener('pointerleave', () => { under.hidden = true })
  choose()
}
