// A device on npm's CoAP, over UDP: node device.js HUB-PORT DEVICE-ID CODE
//
// It signs up, signs in and publishes /log. Each line on its standard input, base64, is a new value of /log: it is told to
// whoever observes. What happens goes to standard output, a line each; an error ends it.
import { createSocket } from 'node:dgram'
import { createInterface } from 'node:readline'
import coap from 'coap'
import { cbor as encode } from './cbor.js'

const [port, id, code] = process.argv.slice(2)

// The hub's requests come to where the device's came from, so client and server share one socket. The server takes
// requests, the client everything else.
const socket = createSocket('udp4')
const agent = new coap.Agent({ socket })
const server = coap.createServer()
coap.registerFormat('application/vnd.ocf+cbor', 10000)

const cbor = v => Buffer.from(encode(v))

// ask sends a request to the hub and returns its answer, which it wants in JSON.
function ask (pathname, body, query) {
  return new Promise((resolve, reject) => {
    const req = agent.request({ host: '127.0.0.1', port, pathname, query, method: 'POST', confirmable: true })
    req.setOption('Content-Format', 'application/vnd.ocf+cbor')
    req.setOption('Accept', 'application/json')
    req.on('error', reject)
    req.on('response', res => res.code === '2.04' ? resolve(JSON.parse(res.payload)) : reject(new Error(`${pathname}: ${res.code} ${res.payload}`)))
    req.end(cbor(body))
  })
}

const links = [{ href: '/log', rt: ['x.log'], if: ['oic.if.r'], p: { bm: 3 } }]
let value = Buffer.from('nothing yet')
let observer = null

// tell writes the value to the observer. The library cuts answers into blocks, but not notifications, and takes 1280 bytes at
// most for a message. What does not fit is cut here: its first block goes out, and the hub asks for the others (RFC 7959,
// Section 2.6), which the library answers with this same ETag. Options stay from one notification to the next.
function tell () {
  const whole = value.length < 1200
  const etag = Buffer.of(0, 0)
  value.forEach((b, i) => { etag[i & 1] ^= b })
  observer.setOption('Content-Format', 'application/octet-stream')
  observer.setOption('ETag', etag)
  observer.setOption('Block2', whole ? [] : Buffer.of(8 | 6)) // block 0 of 1024 bytes, and there are more
  observer.write(whole ? value : value.subarray(0, 1024))
}

server.on('request', (req, res) => {
  const url = new URL(req.url, 'coap://device')
  if (url.pathname === '/oic/res' && url.searchParams.get('if') !== 'oic.if.b') { // there are no batches
    res.setOption('Content-Format', 'application/vnd.ocf+cbor')
    res.end(cbor(links))
  } else if (url.pathname !== '/log') {
    res.statusCode = url.pathname === '/oic/res' ? '4.00' : '4.04'
    res.end()
  } else if (req.headers.Observe === 0) {
    observer = res
    tell()
    console.log('observed')
  } else {
    res.setOption('Content-Format', 'application/octet-stream')
    res.end(value)
  }
})

await new Promise(resolve => socket.bind(0, '127.0.0.1', resolve))
server.listen(socket)
const account = await ask('/oic/sec/account', { di: id, accesstoken: code })
await ask('/oic/sec/session', { di: id, uid: account.uid, accesstoken: account.accesstoken, login: true })
await ask('/oic/rd', { di: id, ttl: 0, links }, 'rt=oic.wk.rdpub')
console.log('published')

for await (const line of createInterface({ input: process.stdin })) {
  value = Buffer.from(line, 'base64')
  tell()
}
process.exit()
