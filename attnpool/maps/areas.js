// The name of the area under the pointer, beside it and in the legend; and how strong colours are.
for (const areas of document.querySelectorAll('.areas')) {
  const names = JSON.parse(areas.querySelector('script[type="application/json"]').textContent)
  const items = Object.fromEntries([...areas.querySelectorAll('.legend li')].map(li => [li.dataset.name, li]))
  const strength = areas.querySelector('.strength'), kept = new WeakMap()
  strength.hidden = false
  strength.querySelector('input').addEventListener('input', e => areas.style.setProperty('--strength', e.target.value))
  const under = Object.assign(document.createElement('div'), {className: 'under', hidden: true})
  areas.append(under)

  function pixels(img) {
    if (kept.has(img)) return kept.get(img)
    const canvas = document.createElement('canvas')
    canvas.width = img.naturalWidth; canvas.height = img.naturalHeight
    const pen = canvas.getContext('2d', {willReadFrequently: true})
    pen.imageSmoothingEnabled = false
    pen.drawImage(img, 0, 0)
    kept.set(img, pen)
    return pen
  }
  function name_at(img, e) {
    const box = img.getBoundingClientRect()
    const x = Math.floor((e.clientX - box.left) / box.width * img.naturalWidth)
    const y = Math.floor((e.clientY - box.top) / box.height * img.naturalHeight)
    if (x < 0 || y < 0 || x >= img.naturalWidth || y >= img.naturalHeight) return ''
    const [r, g, b, a] = pixels(img).getImageData(x, y, 1, 1).data
    return names[a ? `${r},${g},${b}` : 'clear'] ?? ''
  }
  function show(name, e) {
    for (const [key, li] of Object.entries(items)) li.classList.toggle('on', key === name)
    under.hidden = !name
    if (!name) return
    under.textContent = name
    const width = under.offsetWidth
    under.style.left = `${Math.max(4, Math.min(e.clientX + 12, innerWidth - width - 6))}px`
    under.style.top = `${e.clientY > 48 ? e.clientY - 34 : e.clientY + 22}px`
  }
  const told = e => {
    const stage = e.target.closest?.('.truth .stage, .said .stage')
    show(stage ? name_at(stage.querySelector('img'), e) : '', e)
  }
  areas.addEventListener('pointermove', told)
  areas.addEventListener('pointerdown', told)
  areas.addEventListener('pointerleave', e => show('', e))
}
