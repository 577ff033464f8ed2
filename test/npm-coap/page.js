// A page in a browser that is a device, without the browser: node page.js HUB-URL DEVICE-ID CODE
//
// It speaks CoAP over a WebSocket (RFC 8323, Section 4) by hand, on the WebSocket that browsers have. It signs up, signs in,
// publishes /slider, looks for lights and observes the first one. Each line on its standard input is where the slider was
// put: who observes it hears of that, and the light gets it as its power. What happens goes to standard output, a line each;
// an error ends it. Its end is an end of the observation and a Close.
import { createInterface } from 'node:readline'
import { WebSocket } from 'undici'
import { cbor } from './cbor.js'

const [url, id, code] = process.argv.slice(2)
const GET = 0x01; const POST = 0x02; const CONTENT = 0x45; const NOT_FOUND = 0x84
const CSM = 0xe1; const PING = 0xe2; const PONG = 0xe3; const RELEASE = 0xe4; const ABORT = 0xe5
const OBSERVE = 6; const URI_PATH = 11; const CONTENT_FORMAT = 12; const URI_QUERY = 15; const ACCEPT = 17
const OCF_CBOR = [0x27, 0x10]; const JSON_FORMAT = [50]
const text = s => new TextEncoder().encode(s)

// encode makes a message: a length of zero and that of the token, the code, the token, the options in their order, and the
// payload behind its marker (RFC 8323, Section 4.2).
function encode ({ code, token = [], options = [], payload = [] }) {
  const out = [token.length, code, ...token]
  let last = 0
  for (const [n, value] of [...options].sort((a, b) => a[0] - b[0])) { // stable: paths and queries stay in order
    const wide = x => x < 13 ? [x, []] : x < 269 ? [13, [x - 13]] : [14, [x - 269 >> 8, x - 269 & 255]]
    const [delta, more] = wide(n - last)
    const [length, evenMore] = wide(value.length)
    out.push(delta << 4 | length, ...more, ...evenMore, ...value)
    last = n
  }
  if (payload.length > 0) out.push(0xff, ...payload)
  return Uint8Array.from(out)
}

function decode (b) {
  if (b[0] > 8) throw new Error(`a message that begins with ${b[0]}`)
  const m = { code: b[1], token: [...b.subarray(2, 2 + b[0])], options: [], payload: new Uint8Array() }
  let n = 0
  for (let i = 2 + b[0]; i < b.length;) {
    if (b[i] === 0xff) {
      m.payload = b.subarray(i + 1)
      break
    }
    const head = b[i++]
    const wide = x => x < 13 ? x : x === 13 ? 13 + b[i++] : 269 + (b[i++] << 8) + b[i++]
    n += wide(head >> 4)
    const length = wide(head & 15)
    m.options.push([n, b.subarray(i, i + length)])
    i += length
  }
  return m
}

const path = m => '/' + m.options.filter(o => o[0] === URI_PATH).map(o => new TextDecoder().decode(o[1])).join('/')
const number = b => [...b].reduce((n, x) => n << 8 | x, 0)

// Pages name where they come from, and cannot help it; that this one is the hub's own stands here.
const socket = new WebSocket(url, { protocols: ['coap'], headers: { Origin: new URL(url.replace(/^ws/, 'http')).origin } })
socket.binaryType = 'arraybuffer'
const send = m => socket.send(encode(m))
const waiting = new Map() // who waits for an answer, by its token
let tokens = 0
let leaving = false

// ask sends a request; the answer comes to take, and those behind it, too, as long as take returns true.
function ask (method, path, { query = [], options = [], payload = [], token = [++tokens] } = {}, take = () => false) {
  return new Promise(resolve => {
    waiting.set(token[0], m => {
      resolve(m)
      return take(m)
    })
    send({
      code: method,
      token,
      payload,
      options: [...path.slice(1).split('/').map(s => [URI_PATH, text(s)]), ...query.map(s => [URI_QUERY, text(s)]), ...options]
    })
  })
}

async function must (want, answer) {
  const m = await answer
  if (m.code !== want) throw new Error(`${m.code >> 5}.${m.code & 31}: ${new TextDecoder().decode(m.payload)}`)
  return m
}

let heard = 0
socket.onmessage = e => {
  const m = decode(new Uint8Array(e.data))
  if (heard++ === 0 && m.code !== CSM) throw new Error('the first message is no CSM') // RFC 8323, Section 4.3
  if (m.code === PING) send({ code: PONG, token: m.token })
  if (m.code === RELEASE || m.code === ABORT) throw new Error(`the hub ends it: ${new TextDecoder().decode(m.payload)}`)
  if (m.code >> 5 === 0) serve(m)
  if (m.code >> 5 >= 2 && m.code >> 5 <= 5) {
    const take = waiting.get(m.token[0])
    if (take && !take(m)) waiting.delete(m.token[0])
  }
}
socket.onclose = e => {
  if (!leaving) throw new Error(`closed: ${e.code} ${e.reason}`)
  console.log(`closed ${e.code}`)
}
await new Promise((resolve, reject) => {
  socket.onopen = resolve
  socket.onerror = e => reject(new Error(e.message))
})
if (socket.protocol !== 'coap') throw new Error(`the subprotocol is ${socket.protocol}`)
send({ code: CSM, options: [[2, [1, 0, 0]]] }) // messages of 64 KiB

// serve answers the hub, which is the client of this device's resources.
const links = [{ href: '/oic/d', rt: ['oic.wk.d'], if: ['oic.if.r'], p: { bm: 1 } }, { href: '/slider', rt: ['x.slider'], if: ['oic.if.s'], p: { bm: 3 } }]
let slider = 0
let observer = null // the token of the hub's observation
function serve (m) {
  const has = { '/oic/res': links, '/oic/d': { di: id, n: 'page' }, '/slider': { value: slider } }[path(m)]
  const observes = path(m) === '/slider' && m.options.some(o => o[0] === OBSERVE && number(o[1]) === 0)
  if (observes) observer = m.token
  send(has === undefined ? { code: NOT_FOUND, token: m.token } : content(m.token, has, observes))
}
const content = (token, v, observed) => ({
  code: CONTENT, token, payload: cbor(v), options: [[CONTENT_FORMAT, OCF_CBOR], ...(observed ? [[OBSERVE, []]] : [])]
})

const body = v => ({ payload: cbor(v), options: [[CONTENT_FORMAT, OCF_CBOR], [ACCEPT, JSON_FORMAT]] })
const json = m => JSON.parse(new TextDecoder().decode(m.payload))
const account = json(await must(0x44, ask(POST, '/oic/sec/account', body({ di: id, accesstoken: code }))))
await must(0x44, ask(POST, '/oic/sec/session', body({ di: id, uid: account.uid, accesstoken: account.accesstoken, login: true })))
await must(0x44, ask(POST, '/oic/rd', { query: ['rt=oic.wk.rdpub'], ...body({ di: id, ttl: 0, links }) }))
const [light] = json(await must(CONTENT, ask(GET, '/oic/res', { query: ['rt=core.light'], options: [[ACCEPT, JSON_FORMAT]] })))
console.log(`found ${light.href}`)

// RFC 8323, Section 7.1: what comes later is newer, whatever number it has; only that there is one says that more will come.
const token = [++tokens]
await must(CONTENT, ask(GET, light.href, { token, options: [[OBSERVE, []]] }, m => {
  const more = m.options.some(o => o[0] === OBSERVE)
  console.log(`state ${Buffer.from(m.payload).toString('base64')} ${number(m.options.find(o => o[0] === CONTENT_FORMAT)[1])}`)
  return more
}))
for await (const line of createInterface({ input: process.stdin })) {
  slider = Number(line)
  if (observer) send(content(observer, { value: slider }, true))
  const m = await ask(POST, light.href, body({ power: slider }))
  console.log(`answered ${m.code >> 5}.${String(m.code & 31).padStart(2, '0')}`)
}
leaving = true
await must(CONTENT, ask(GET, light.href, { token, options: [[OBSERVE, [1]]] }))
socket.close(1000)
