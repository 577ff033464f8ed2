package coap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"hash/maphash"
	"slices"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// block is the value of Block1 or Block2 (RFC 7959, Section 2.2).
type block struct {
	num  uint32
	more bool
	szx  uint8 // 7 is BERT (RFC 8323, Section 6)
}

const (
	szxBERT     = 7
	maxBlockNum = 1<<20 - 1
)

// size is the unit the block number counts.
func (b block) size() int {
	if b.szx == szxBERT {
		return 1024
	}
	return 1 << (b.szx + 4)
}

func (b block) offset() int { return int(b.num) * b.size() }

func (b block) value() []byte {
	v := b.num<<4 | uint32(b.szx)
	if b.more {
		v |= 8
	}
	return appendUint(nil, v)
}

// fits reports that a payload of n bytes is what b announces: with more to come a whole block, or with BERT several.
func (b block) fits(n int) bool {
	switch {
	case b.szx == szxBERT && b.more:
		return n > 0 && n%1024 == 0
	case b.szx == szxBERT:
		return true
	case b.more:
		return n == b.size()
	}
	return n <= b.size()
}

// blockOf returns the block option of m. The decoder has checked its length.
func blockOf(m *Message, id message.OptionID) (block, bool, uint32) {
	v, ok := m.Uint(id)
	return block{num: v >> 4, more: v&8 != 0, szx: uint8(v & 7)}, ok, v
}

// chunk chooses how much of a body goes into one message of at most room bytes for it, not above the wanted block size.
func chunk(room int, bert bool, want uint8) (szx uint8, n int, ok bool) {
	if want == szxBERT {
		if bert && room >= 1024 {
			return szxBERT, room / 1024 * 1024, true
		}
		want = 6
	}
	for szx = want; ; szx-- {
		if n = 1 << (szx + 4); n <= room {
			return szx, n, true
		}
		if szx == 0 {
			return 0, 0, false
		}
	}
}

// blockRoom is what block options, sizes, ETag, marker and a longer length field may add to a message.
const blockRoom = 32

// blocks are the block-wise transfers in which the peer is the client. The worker uses them, the wheel expires them.
type blocks struct {
	mu      sync.Mutex
	uploads []*transfer // bodies of requests that are coming in
	bodies  []*transfer // answers that are being taken block by block
	era     int         // how often all bodies were forgotten on purpose
}

// transfer is a body on its way. It is known by what is asked, not by token: some clients use a new token for each block
// (RFC 7959, Section 2.4 and RFC 9175, Section 3).
type transfer struct {
	key   string
	used  time.Duration
	body  []byte
	resp  Response // of an answer: code and options of each block
	asked uint64   // of an answer: the request's payload, hashed
	none  bool     // of a request: its first block had If-None-Match
}

// take removes and returns the transfer with that key.
func take(list *[]*transfer, key string) *transfer {
	for i, t := range *list {
		if t.key == key {
			*list = slices.Delete(*list, i, i+1)
			return t
		}
	}
	return nil
}

// put adds t as the newest; the oldest gives way when there are too many. It returns the bytes that became free.
func put(list *[]*transfer, t *transfer, most int) (freed int) {
	if len(*list) >= most {
		freed = len((*list)[0].body)
		*list = slices.Delete(*list, 0, 1)
	}
	*list = append(*list, t)
	return freed
}

// expire forgets transfers that were not used since before, and reports whether some are left.
func (b *blocks) expire(before time.Duration, from *budget) (left bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, list := range []*[]*transfer{&b.uploads, &b.bodies} {
		*list = slices.DeleteFunc(*list, func(t *transfer) bool {
			if t.used > before {
				return false
			}
			from.give(len(t.body))
			return true
		})
		left = left || len(*list) > 0
	}
	return left
}

func (b *blocks) clear(from *budget) {
	b.mu.Lock()
	defer b.mu.Unlock()
	forget(&b.uploads, from)
	forget(&b.bodies, from)
}

func forget(list *[]*transfer, from *budget) {
	for _, t := range *list {
		from.give(len(t.body))
	}
	*list = nil
}

// cacheKey is what makes two requests parts of one transfer: method and all options but those of the transfer itself (RFC
// 7959, Section 2.4). Request-Tag stays in (RFC 9175, Section 3.2).
func cacheKey(m *Message) string {
	b := []byte{byte(m.Code)}
	for _, o := range m.Options {
		switch {
		case o.ID == Block1, o.ID == Block2, o.ID == ObserveOption, o.ID == NoResponse:
			continue
		case o.ID == IfNoneMatch: // RFC 7959, Section 2.10: only on the first block
			continue
		case o.ID&0x1e == 0x1c: // RFC 7252, Section 5.4.6: NoCacheKey, such as the sizes and Echo
			continue
		}
		b = binary.BigEndian.AppendUint16(b, uint16(o.ID))
		b = binary.BigEndian.AppendUint32(b, uint32(len(o.Value))) //nolint:gosec // bounded by the message
		b = append(b, o.Value...)
	}
	sum := sha256.Sum256(b) // the options may be large, what is kept of them must not
	return string(sum[:])
}

// errText makes an error answer of the engine's own.
func errText(code codes.Code, text string) Response {
	return Response{Code: code, Payload: []byte(text)}
}

// serve answers one request, which may be one block of something larger. The worker calls it.
func (c *Conn) serve(m *Message) {
	cfg := &c.srv.cfg
	c.blocks.mu.Lock()
	m.era = c.blocks.era
	c.blocks.mu.Unlock()
	whole := m
	held := 0 // the upload's bytes, until the handler has returned
	b1, has1, _ := blockOf(m, Block1)
	b2, has2, _ := blockOf(m, Block2)
	switch {
	case c.dg != nil && (has1 && b1.szx == szxBERT || has2 && b2.szx == szxBERT):
		c.respond(m, errText(codes.BadRequest, "block size 7 is reserved")) // RFC 7959, Section 2.2; BERT is for streams
		return
	case has1:
		var done bool
		var r Response
		if whole, r, done = c.assemble(m, b1); !done {
			c.respond(m, r)
			if r.Code != codes.Continue {
				c.refused(m)
			}
			return
		}
		held = len(whole.Payload)
	case len(m.Payload) > cfg.MaxBody:
		c.respond(m, c.tooLarge())
		c.refused(m)
		return
	}
	var r Response
	if has2 && b2.num > 0 {
		var ok bool
		if r, ok = c.kept(m); !ok {
			if m.Code != codes.GET && (m.Code != codeFetch || len(m.Payload) == 0) {
				// Doing it again would be another act (RFC 7959, Section 2.9.2); a FETCH can be asked anew only with its body.
				c.srv.budget.give(held)
				c.respond(m, errText(codes.RequestEntityIncomplete, "the answer is no longer kept"))
				c.refused(m)
				return
			}
			r = c.request(whole)
		}
		m.again = ok
	} else {
		r = c.request(whole)
	}
	c.srv.budget.give(held)
	if r.Later == nil {
		c.reply(m, whole, r)
	} else if !c.beside(messageCost+len(whole.Payload), r.Later, func(r Response) { c.reply(m, whole, r) }) {
		c.reply(m, whole, busy())
	}
}

// messageCost is what a message costs besides its bytes, roughly.
const messageCost = 256

// reply answers m with what the handler said to the whole of which it is the last block.
func (c *Conn) reply(m, whole *Message, r Response) {
	if r.Silent {
		if c.dg != nil && m.from != nil {
			// As if it had been lost: it comes again, and then finds a session that is over, which over plain UDP begins another.
			c.dg.forget(m.from, "closing")
		}
		return
	}
	if b1, has1, _ := blockOf(m, Block1); has1 {
		r.Options = AddOption(slices.Clone(r.Options), Block1, block{num: b1.num, szx: b1.szx}.value())
	}
	c.respond(m, r)
	c.registered(whole)
	if r.Close {
		c.shut(ErrAnswered, false)
	}
}

const codeFetch codes.Code = 5 // RFC 8132

// tooLarge is 4.13 with the size that would do (RFC 7959, Section 2.9.3).
func (c *Conn) tooLarge() Response {
	r := errText(codes.RequestEntityTooLarge, "too-large: the body is larger than the limit")
	r.Options = AddUint(nil, Size1, uint32(c.srv.cfg.MaxBody)) //nolint:gosec // a few hundred KiB
	return r
}

// assemble adds one block of a request body (RFC 7959, Section 2.5). With the last one it returns the whole request, whose
// bytes are still taken from the budget; before that, what to answer.
func (c *Conn) assemble(m *Message, b block) (whole *Message, r Response, done bool) {
	cfg, t := &c.srv.cfg, c.srv.budget
	echo := AddOption(nil, Block1, b.value())
	c.blocks.mu.Lock()
	defer c.blocks.mu.Unlock()
	key := cacheKey(m)
	up := take(&c.blocks.uploads, key) // a refusal below forgets it; the client begins again
	drop := func(r Response) (*Message, Response, bool) {
		if up != nil {
			t.give(len(up.body))
		}
		return nil, r, false
	}
	if !b.fits(len(m.Payload)) {
		return drop(errText(codes.BadRequest, "the payload is not as long as the block option says"))
	}
	if b.num == 0 {
		if up != nil {
			t.give(len(up.body)) // RFC 7959, Section 2.5: block 0 begins anew
		}
		up = &transfer{key: key}
		_, up.none = m.Option(IfNoneMatch)
		if size, ok := m.Uint(Size1); ok && int64(size) > int64(cfg.MaxBody) {
			return drop(c.tooLarge())
		}
	}
	if c.dg != nil && up != nil && b.more && b.num > 0 && b.offset()+len(m.Payload) == len(up.body) && bytes.Equal(up.body[b.offset():], m.Payload) {
		// The newest block once more, in a message of its own: its answer was lost, not the block. (A stream loses nothing.)
		up.used = c.srv.now()
		t.give(put(&c.blocks.uploads, up, cfg.MaxTransfers))
		return nil, Response{Code: codes.Continue, Options: echo}, false
	}
	if up == nil || b.offset() != len(up.body) {
		return drop(errText(codes.RequestEntityIncomplete, "blocks are missing")) // RFC 7959, Section 2.9.2
	}
	if len(up.body)+len(m.Payload) > cfg.MaxBody {
		return drop(c.tooLarge())
	}
	if !t.take(len(m.Payload)) {
		return drop(busy())
	}
	up.body = append(up.body, m.Payload...)
	if b.more {
		up.used = c.srv.now()
		t.give(put(&c.blocks.uploads, up, cfg.MaxTransfers))
		return nil, Response{Code: codes.Continue, Options: echo}, false
	}
	opts := without(slices.Clone(m.Options), Block1, Size1, IfNoneMatch)
	if up.none {
		opts = AddOption(opts, IfNoneMatch, nil)
	}
	return &Message{Code: m.Code, Token: m.Token, Options: opts, Payload: up.body, from: m.from}, Response{}, true
}

// busy is 5.03 with a time to retry (RFC 7252, Section 5.9.3.4).
func busy() Response {
	r := errText(codes.ServiceUnavailable, "unavailable: the hub is busy, try again later")
	r.Options = AddUint(nil, MaxAge, 5)
	return r
}

// kept returns the answer whose further blocks m asks for. A request may repeat the payload that it goes with, which is part of
// what a FETCH asks for (RFC 8132, Section 2), or leave it out.
func (c *Conn) kept(m *Message) (Response, bool) {
	c.blocks.mu.Lock()
	defer c.blocks.mu.Unlock()
	key := cacheKey(m)
	for _, t := range c.blocks.bodies {
		if t.key == key && (len(m.Payload) == 0 || maphash.Bytes(seed, m.Payload) == t.asked) {
			t.used = c.srv.now()
			r := t.resp
			r.Payload = t.body
			return r, true
		}
	}
	return Response{}, false
}

// ForgetAnswers drops what is kept of answers for the requests of their further blocks, so that who may not ask for them any
// more does not get them (RFC 7959, Section 7). Such a request is then as if nothing had been kept: a GET is asked anew, others
// are 4.08. Of an answer that is still being made (Response.Later) nothing will be kept either.
func (c *Conn) ForgetAnswers() {
	c.blocks.mu.Lock()
	defer c.blocks.mu.Unlock()
	forget(&c.blocks.bodies, c.srv.budget)
	c.blocks.era++
}

// keep keeps an answer for the requests of its further blocks. When the budget is used up it is not kept: a GET is then
// simply asked again.
func (c *Conn) keep(m *Message, r Response) {
	c.blocks.mu.Lock()
	defer c.blocks.mu.Unlock()
	key := cacheKey(m)
	if old := take(&c.blocks.bodies, key); old != nil {
		c.srv.budget.give(len(old.body))
	}
	if m.era != c.blocks.era || !c.srv.budget.take(len(r.Payload)) {
		return
	}
	t := &transfer{key: key, used: c.srv.now(), body: r.Payload, resp: Response{Code: r.Code, Options: r.Options}}
	t.asked = maphash.Bytes(seed, m.Payload)
	c.srv.budget.give(put(&c.blocks.bodies, t, c.srv.cfg.MaxTransfers))
}

// forgetAnswer drops a kept answer whose last block is out.
func (c *Conn) forgetAnswer(m *Message) {
	c.blocks.mu.Lock()
	defer c.blocks.mu.Unlock()
	if old := take(&c.blocks.bodies, cacheKey(m)); old != nil {
		c.srv.budget.give(len(old.body))
	}
}

// respond sends the answer to m, or the block of it that m asks for or that the peer can take.
func (c *Conn) respond(m *Message, r Response) {
	if r.Code == codes.Empty {
		r = errText(codes.InternalServerError, "internal: something went wrong in the hub") // a handler must say something
	}
	if v, ok := m.Uint(NoResponse); ok && v&(1<<(r.Code>>5-1)) != 0 {
		if c.dg != nil {
			c.dg.quiet(m)
		}
		return // RFC 7967, Section 2.1
	}
	out := &Message{Code: r.Code, Token: m.Token, Options: sortOptions(r.Options), Payload: r.Payload}
	largest, bert := c.tr.limits()
	b, asked, _ := blockOf(m, Block2)
	asked = asked && r.Code>>5 == 2 // the diagnostic of an error is not the representation that was asked for
	if asked && len(r.Payload) > 0 || c.tr.size(out) > largest {
		if !c.slice(m, out, b, asked, largest, bert) {
			return
		}
	}
	out.from, out.challenge = m.from, r.Challenge
	if err := c.tr.send(c.ctx, out, true); err != nil {
		c.srv.metrics.dropped.WithLabelValues("unsent").Inc()
	}
}

// slice turns out, a whole answer, into its block b (RFC 7959, Section 2.4).
func (c *Conn) slice(m *Message, out *Message, b block, asked bool, largest int, bert bool) bool {
	body := out.Payload
	want := uint8(szxBERT)
	if asked {
		want = b.szx
	}
	bare := *out
	bare.Payload = nil
	szx, n, ok := chunk(largest-c.tr.size(&bare)-blockRoom, bert, want)
	offset := 0
	if asked {
		offset = b.offset()
	}
	// A peer that asked for larger blocks than it can take gets the same place in smaller ones.
	unit := block{szx: szx}.size()
	switch {
	case !ok:
		*out = Message{Code: codes.InternalServerError, Token: m.Token}
		return true
	case offset > 0 && offset >= len(body):
		*out = Message{Code: codes.BadRequest, Token: m.Token, Payload: []byte("there is no such block")}
		return true
	case (len(body)-1)/unit > maxBlockNum:
		*out = *c.message(m, c.tooLarge())
		return true
	}
	end := min(offset+n, len(body))
	piece := block{num: uint32(offset / unit), more: end < len(body), szx: szx} //nolint:gosec // checked above
	opts := slices.Clone(out.Options)
	if _, has := out.Option(ETagOption); !has && out.Code == codes.Content && len(body) > n {
		// RFC 7959, Section 2.4: the client must be able to tell that its blocks are of one representation.
		h := fnv.New64a()
		_, _ = h.Write(body)
		opts = AddOption(opts, ETagOption, h.Sum(nil))
	}
	if piece.more && (offset == 0 || !m.again) {
		c.keep(m, Response{Code: out.Code, Options: without(slices.Clone(out.Options), Block1), Payload: body})
	}
	if offset == 0 {
		opts = AddUint(opts, Size2, uint32(len(body))) //nolint:gosec // bounded by what handlers make
	} else if !piece.more {
		c.forgetAnswer(m)
	}
	out.Options = AddOption(opts, Block2, piece.value())
	out.Payload = body[offset:end]
	return true
}

func (c *Conn) message(m *Message, r Response) *Message {
	return &Message{Code: r.Code, Token: m.Token, Options: r.Options, Payload: r.Payload}
}

// upload sends m, in blocks if the peer takes no message as large (RFC 7959, Section 2.5), and returns the answer to the
// whole.
func (c *Conn) upload(ctx context.Context, op string, m *Message) (*Message, error) {
	send := func(m *Message, num uint32) (*Message, error) {
		return c.roundTrip(ctx, op, m, &exchange{answer: make(chan answer, 1), block: num})
	}
	largest, bert := c.tr.limits()
	// One token for all blocks: go-coap's servers know a transfer by its token, and with others take the last block for the
	// whole body, without an error. So that a late answer to one block is not taken for that to the next (RFC 9175, Section
	// 4.2), the block number in the answer must be the one that was sent.
	m.Token = c.token()
	if c.tr.size(m) <= largest {
		return send(m, 0)
	}
	part := clone(m)
	part.Token, part.Payload = m.Token, nil
	tag := binary.BigEndian.AppendUint32(nil, uint32(c.nextToken.Add(1))) //nolint:gosec // any four bytes will do
	base := AddOption(part.Options, RequestTag, tag)
	part.Options = base
	m.Options = slices.Clone(base) // the tag also belongs to the requests for the blocks of the answer
	room := largest - c.tr.size(part) - blockRoom
	szx, n, ok := chunk(room, bert, szxBERT)
	if !ok {
		return nil, errPeerLimit.With(op, nil)
	}
	for offset := 0; ; {
		unit := block{szx: szx}.size()
		if offset/unit > maxBlockNum {
			return nil, errPeerLimit.With(op, nil)
		}
		end := min(offset+n, len(m.Payload))
		b := block{num: uint32(offset / unit), more: end < len(m.Payload), szx: szx} //nolint:gosec // checked above
		part.Options = AddOption(slices.Clone(base), Block1, b.value())
		if offset == 0 {
			part.Options = AddUint(part.Options, Size1, uint32(len(m.Payload))) //nolint:gosec // bounded by memory of ours
		} else {
			part.Options = without(part.Options, IfNoneMatch) // RFC 7959, Section 2.10
		}
		part.Payload = m.Payload[offset:end]
		answer, err := send(part, b.num)
		if err != nil {
			return nil, err
		}
		got, has, _ := blockOf(answer, Block1)
		smaller := has && got.szx < szx
		switch {
		case answer.Code == codes.RequestEntityTooLarge && smaller && offset == 0:
			// RFC 7959, Section 2.9.3: the peer wants smaller blocks; begin again with those.
			szx, n, _ = chunk(room, bert, got.szx)
			continue
		case c.dg != nil && has && got.num != b.num:
			return nil, errAnswer.With(op, errBlocks)
		case !b.more || answer.Code != codes.Continue:
			answer.Options = without(answer.Options, Block1)
			return answer, nil // the last block's answer, or one that ends the transfer early
		}
		offset = end
		if smaller { // RFC 7959, Section 2.3
			szx, n, _ = chunk(room, bert, got.szx)
		}
	}
}

var errBlocks = errors.New("blocks do not fit together")

// rest fetches the blocks behind first, which answers m or is a notification for it, and returns the whole (RFC 7959,
// Section 2.4). Blocks of different representations are never mixed: when the ETag changes it begins again, twice at most. A
// whole of several blocks holds bytes of the budget, which the caller gives back.
func (c *Conn) rest(ctx context.Context, op string, m, first *Message) (_ *Message, held int, err error) {
	cfg := &c.srv.cfg
	b, has, _ := blockOf(first, Block2)
	if !has {
		if len(first.Payload) > cfg.MaxBody {
			return nil, 0, errBody.With(op, nil)
		}
		return first, 0, nil
	}
	taken := share{of: c.srv.budget}
	defer func() {
		if err != nil {
			taken.drop()
		}
	}()
	req := clone(m)
	_, has = m.Option(ObserveOption)
	// RFC 7959, Section 3.4: further blocks are asked for without Observe; the body was sent already.
	req.Options, req.Payload = without(req.Options, ObserveOption, Block1, Size1, Block2), nil
	if req.Token = m.Token; has {
		req.Token = c.token() // that of the observation is for notifications
	}
	// Over UDP a token for each block, so that a late answer matches nothing (RFC 9175, Section 4.2). Not where asking again is
	// another act: go-coap's servers know an answer by its token, and would do again what they find under none.
	fresh := c.dg != nil && (m.Code == codes.GET || m.Code == codeFetch)
	for try := 0; ; try++ {
		if size, ok := first.Uint(Size2); ok && int64(size) > int64(cfg.MaxBody) {
			return nil, 0, errBody.With(op, fmt.Errorf("%d bytes announced", size))
		}
		whole := *first
		whole.Payload = slices.Clip(first.Payload)
		b, _, _ = blockOf(first, Block2)
		if b.num != 0 || !b.fits(len(first.Payload)) {
			return nil, 0, errAnswer.With(op, errBlocks)
		}
		changed := false
		if b.more && !taken.take(messageCost+len(first.Payload)) {
			return nil, 0, errBuffered.With(op, nil)
		}
		for b.more {
			if len(whole.Payload) > cfg.MaxBody {
				return nil, 0, errBody.With(op, nil)
			}
			next := block{num: uint32(len(whole.Payload) / b.size()), szx: b.szx} //nolint:gosec // bounded by MaxBody
			part := *req
			part.Options = AddOption(slices.Clone(req.Options), Block2, next.value())
			if fresh {
				part.Token = c.token()
			}
			answer, err := c.roundTrip(ctx, op, &part, &exchange{answer: make(chan answer, 1)})
			if err != nil {
				return nil, 0, err
			}
			if answer.Code != first.Code {
				if answer.Code>>5 == 2 {
					changed = true
					break
				}
				taken.drop()
				return answer, 0, nil // an error code: the resource went away meanwhile
			}
			if !bytes.Equal(ETag(answer), ETag(first)) {
				changed = true
				break
			}
			got, ok, _ := blockOf(answer, Block2)
			if !ok || got.offset() != len(whole.Payload) || !got.fits(len(answer.Payload)) || len(answer.Payload) == 0 {
				return nil, 0, errAnswer.With(op, errBlocks)
			}
			if !taken.take(len(answer.Payload)) {
				return nil, 0, errBuffered.With(op, nil)
			}
			whole.Payload = append(whole.Payload, answer.Payload...)
			b = got
		}
		if !changed {
			if len(whole.Payload) > cfg.MaxBody {
				return nil, 0, errBody.With(op, nil)
			}
			whole.Options = without(slices.Clone(whole.Options), Block2, Size2)
			return &whole, taken.n, nil
		}
		if try == 2 || m.Code != codes.GET && m.Code != codeFetch {
			return nil, 0, errAnswer.With(op, errors.New("the representation keeps changing"))
		}
		taken.drop()
		again := *req
		again.Payload = m.Payload // FETCH: asked anew, with its body
		if fresh {
			again.Token = c.token()
		}
		if first, err = c.roundTrip(ctx, op, &again, &exchange{answer: make(chan answer, 1)}); err != nil {
			return nil, 0, err
		}
		if _, has, _ = blockOf(first, Block2); !has {
			if len(first.Payload) > cfg.MaxBody {
				return nil, 0, errBody.With(op, nil)
			}
			return first, 0, nil
		}
	}
}
