package coap

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// RFC 7959, Section 2.2.
func TestBlockValue(t *testing.T) {
	for _, tc := range []struct {
		b    block
		want string
		size int
		at   int
	}{
		{block{0, false, 0}, "", 16, 0},
		{block{0, true, 2}, "0a", 64, 0}, // recorded
		{block{1, false, 6}, "16", 1024, 1024},
		{block{15, true, 6}, "fe", 1024, 15360},
		{block{16, true, 6}, "010e", 1024, 16384},
		{block{3, true, szxBERT}, "3f", 1024, 3072},
		{block{maxBlockNum, true, 6}, "fffffe", 1024, maxBlockNum * 1024},
	} {
		if got := fmt.Sprintf("%x", tc.b.value()); got != tc.want {
			t.Errorf("%+v is %s, want %s", tc.b, got, tc.want)
		}
		m := &Message{Options: message.Options{{ID: Block1, Value: tc.b.value()}}}
		if b, ok, _ := blockOf(m, Block1); !ok || b != tc.b || b.size() != tc.size || b.offset() != tc.at {
			t.Errorf("%+v read as %+v", tc.b, b)
		}
	}
}

func TestChunk(t *testing.T) {
	for _, tc := range []struct {
		room int
		bert bool
		want uint8
		szx  uint8
		n    int
		ok   bool
	}{
		{1100, false, szxBERT, 6, 1024, true},
		{5000, true, szxBERT, szxBERT, 4096, true},
		{5000, true, 6, 6, 1024, true},
		{1000, true, szxBERT, 5, 512, true},
		{5000, true, 2, 2, 64, true},
		{16, false, 6, 0, 16, true},
		{15, false, 6, 0, 0, false},
		{-40, false, 6, 0, 0, false},
	} {
		if szx, n, ok := chunk(tc.room, tc.bert, tc.want); szx != tc.szx || n != tc.n || ok != tc.ok {
			t.Errorf("%+v: %d %d %v", tc, szx, n, ok)
		}
	}
}

func echoHandler() handlerFuncs {
	return handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if m.Code == codes.GET {
			return Response{Code: codes.Content, Options: AddUint(nil, ContentFormatOpt, 42), Payload: pattern(3000)}
		}
		return Response{Code: codes.Changed, Payload: m.Payload}
	}}
}

// sendBlocks uploads body in blocks, each with a token of its own as libcoap does, and returns the last answer.
func sendBlocks(t *testing.T, p *peer, body []byte, szx uint8, n int, opts func(*Message)) *Message {
	t.Helper()
	unit := block{szx: szx}.size()
	for at := 0; ; at += n {
		end := min(at+n, len(body))
		b := block{num: uint32(at / unit), more: end < len(body), szx: szx} //nolint:gosec // small
		m := post("/up", body[at:end])
		m.Token = fmt.Appendf(nil, "%05d", at/n)
		m.Options = AddOption(m.Options, Block1, b.value())
		if opts != nil {
			opts(m)
		}
		r := p.ask(m)
		if !b.more || r.Code != codes.Continue {
			return r
		}
		if v, _ := r.Option(Block1); !bytes.Equal(v, b.value()) {
			t.Fatalf("block %d was confirmed as %x", b.num, v)
		}
	}
}

// RFC 7959, Section 2.5; RFC 8323, Section 6.
func TestUpload(t *testing.T) {
	for _, tc := range []struct {
		name string
		size int
		szx  uint8
		n    int
	}{
		{"one block", 10, 6, 1024},
		{"whole blocks", 2048, 6, 1024},
		{"blocks of 16", 1000, 0, 16},
		{"BERT", 100_000, szxBERT, 8192},
		{"as large as may be", MaxBody, szxBERT, 65536},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, echoHandler(), nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				p.csm(1<<20, true)
				body := pattern(tc.size)
				r := sendBlocks(t, p, body, tc.szx, tc.n, nil)
				wantCode(t, r, codes.Changed)
				if !bytes.Equal(r.Payload, body) {
					t.Fatalf("%d bytes came back", len(r.Payload))
				}
				if b, ok, _ := blockOf(r, Block1); !ok || b.more {
					t.Errorf("the last answer has Block1 %+v", b)
				}
			})
		})
	}
}

func TestUploadRefused(t *testing.T) {
	b1 := func(num uint32, more bool, szx uint8) []byte { return block{num, more, szx}.value() }
	with := func(n int, value []byte) *Message {
		m := post("/up", pattern(n))
		m.Options = AddOption(m.Options, Block1, value)
		return m
	}
	for _, tc := range []struct {
		name string
		send []*Message // all but the last are confirmed
		want codes.Code
	}{
		{"no beginning", []*Message{with(1024, b1(1, true, 6))}, codes.RequestEntityIncomplete},
		{"a gap", []*Message{with(1024, b1(0, true, 6)), with(1024, b1(2, true, 6))}, codes.RequestEntityIncomplete},
		{"the same block again", []*Message{with(1024, b1(0, true, 6)), with(1024, b1(1, true, 6)), with(1024, b1(1, true, 6))}, codes.RequestEntityIncomplete},
		{"another Request-Tag", []*Message{with(1024, b1(0, true, 6)), with(1024, b1(1, true, 6)).with(RequestTag, 1)}, codes.RequestEntityIncomplete},
		{"shorter than it says", []*Message{with(100, b1(0, true, 6))}, codes.BadRequest},
		{"longer than it says", []*Message{with(1025, b1(0, false, 6))}, codes.BadRequest},
		{"BERT in pieces", []*Message{with(1500, b1(0, true, szxBERT))}, codes.BadRequest},
		{"empty block with more", []*Message{with(0, b1(0, true, szxBERT))}, codes.BadRequest},
		{"Size1 over the limit", []*Message{with(1024, b1(0, true, 6)).with(Size1, MaxBody+1)}, codes.RequestEntityTooLarge},
		{"grows over the limit", []*Message{with(200<<10, b1(0, true, szxBERT)), with(57<<10, b1(200, false, szxBERT))}, codes.RequestEntityTooLarge},
		{"one byte over the limit", []*Message{with(255<<10, b1(0, true, szxBERT)), with(1025, b1(255, false, szxBERT))}, codes.RequestEntityTooLarge},
		{"Block1 of four bytes", []*Message{with(1, []byte{1, 0, 0, 0})}, codes.BadOption},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, echoHandler(), nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				p.csm(1<<20, true)
				for _, m := range tc.send[:len(tc.send)-1] {
					wantCode(t, p.ask(m), codes.Continue)
				}
				wantCode(t, p.ask(tc.send[len(tc.send)-1]), tc.want)
				wantCode(t, sendBlocks(t, p, pattern(5000), 6, 1024, nil), codes.Changed) // begun again, it works
			})
		})
	}
}

// Two transfers to one path are told apart by Request-Tag (RFC 9175, Section 3), whatever their tokens.
func TestUploadsInterleaved(t *testing.T) {
	bubble(t, echoHandler(), nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.csm(1<<20, true)
		part := func(tag uint32, num uint32, more bool, fill byte) *Message {
			m := post("/up", bytes.Repeat([]byte{fill}, 1024)).with(RequestTag, tag)
			m.Options = AddOption(m.Options, Block1, block{num, more, 6}.value())
			return m
		}
		wantCode(t, p.ask(part(1, 0, true, 'a')), codes.Continue)
		wantCode(t, p.ask(part(2, 0, true, 'b')), codes.Continue)
		for tag, fill := range map[uint32]byte{1: 'a', 2: 'b'} {
			r := p.ask(part(tag, 1, false, fill))
			if !bytes.Equal(r.Payload, bytes.Repeat([]byte{fill}, 2048)) {
				t.Fatalf("transfer %d: %v, %d bytes", tag, r.Code, len(r.Payload))
			}
		}
	})
}

// fetchBlocks takes a representation block by block from num on, with a new token for each.
func fetchBlocks(t *testing.T, p *peer, m *Message, szx uint8, first []byte) (body, etag []byte) {
	t.Helper()
	body = first
	for {
		req := *m
		req.Token = fmt.Appendf(nil, "%06d", len(body))
		req.Options = AddOption(append(message.Options(nil), m.Options...), Block2, block{num: uint32(len(body) / block{szx: szx}.size()), szx: szx}.value()) //nolint:gosec // small
		r := p.ask(&req)
		if r.Code>>5 != 2 {
			t.Fatalf("at %d: %v %q", len(body), r.Code, r.Payload)
		}
		if etag != nil && !bytes.Equal(ETag(r), etag) {
			t.Fatalf("ETag changed from %x to %x", etag, ETag(r))
		}
		etag = ETag(r)
		body = append(body, r.Payload...)
		if b, ok, _ := blockOf(r, Block2); !ok || !b.more {
			return body, etag
		}
	}
}

// RFC 7959, Section 2.4.
func TestDownload(t *testing.T) {
	for _, szx := range []uint8{0, 2, 6, szxBERT} {
		bubble(t, echoHandler(), nil, func(t *testing.T, s *sim) {
			p := s.dial(t)
			if szx == szxBERT {
				p.csm(2500, true)
			}
			body, etag := fetchBlocks(t, p, get("/big"), szx, nil)
			if !bytes.Equal(body, pattern(3000)) || len(etag) == 0 {
				t.Fatalf("szx %d: %d bytes, ETag %x", szx, len(body), etag)
			}
		})
	}
}

// The first block says how much there is; the kept answer serves the rest even if the handler would say something new.
func TestDownloadOfChangingResource(t *testing.T) {
	version := byte(0)
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		version++
		return Response{Code: codes.Content, Payload: bytes.Repeat([]byte{version}, 3000)}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		r := p.ask(get("/changing"))
		if n, _ := r.Uint(Size2); n != 3000 || len(r.Payload) != 1024 {
			t.Fatalf("Size2 %d, %d bytes", n, len(r.Payload))
		}
		body, _ := fetchBlocks(t, p, get("/changing"), 6, r.Payload)
		if !bytes.Equal(body, bytes.Repeat([]byte{1}, 3000)) {
			t.Fatal("blocks of two versions were mixed")
		}
		synctest.Wait() // the last block is sent before the answer is let go
		s.srv.budget.mu.Lock()
		defer s.srv.budget.mu.Unlock()
		if s.srv.budget.left != s.srv.cfg.MaxBuffered {
			t.Error("the answer is kept after its last block")
		}
	})
}

// RFC 7959, Section 2.4: any block may be asked for first. The answer is made once, not for each block.
func TestDownloadFromTheMiddle(t *testing.T) {
	asked := 0
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		asked++
		return Response{Code: codes.Content, Payload: pattern(5000)}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		body, _ := fetchBlocks(t, p, get("/big"), 6, pattern(5000)[:2048])
		if !bytes.Equal(body, pattern(5000)) || asked != 1 {
			t.Fatalf("%d bytes, and the answer was made %d times", len(body), asked)
		}
		synctest.Wait() // the last block is sent before the answer is let go
		s.srv.budget.mu.Lock()
		defer s.srv.budget.mu.Unlock()
		if s.srv.budget.left != s.srv.cfg.MaxBuffered {
			t.Error("the answer is kept after its last block")
		}
	})
}

func TestDownloadRefused(t *testing.T) {
	bubble(t, echoHandler(), nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		wantCode(t, p.ask(get("/big").with(Block2, 3<<4|6)), codes.BadRequest)                   // RFC 7959, Section 2.4: behind the end
		wantCode(t, p.ask(post("/up", nil).with(Block2, 1<<4|6)), codes.RequestEntityIncomplete) // nothing kept: doing it again would be another act
	})
}

// A POST whose body and answer both go in blocks.
func TestUploadAndDownload(t *testing.T) {
	bubble(t, echoHandler(), nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		body := pattern(5000)
		r := sendBlocks(t, p, body, 6, 1024, nil)
		wantCode(t, r, codes.Changed)
		got, _ := fetchBlocks(t, p, post("/up", nil), 6, r.Payload)
		if !bytes.Equal(got, body) {
			t.Fatalf("%d bytes came back", len(got))
		}
	})
}

// Unfinished transfers are forgotten, bounded in number, and paid from the budget.
func TestUnfinishedTransfers(t *testing.T) {
	begin := func(path string) *Message {
		m := post(path, pattern(1024))
		m.Options = AddOption(m.Options, Block1, block{0, true, 6}.value())
		return m
	}
	bubble(t, echoHandler(), func(c *Config) { c.MaxBuffered = 20_000 }, func(t *testing.T, s *sim) {
		p := s.dial(t)
		for i := range 10 {
			wantCode(t, p.ask(begin(fmt.Sprintf("/%d", i))), codes.Continue)
		}
		synctest.Wait()
		if n := s.count("buffered_bytes"); n != 4*1024 {
			t.Errorf("%v bytes kept for %d transfers", n, s.srv.cfg.MaxTransfers)
		}
		go func() {
			for {
				if m, _, err := p.next(); err != nil || m.Code == codes.Ping && p.answer(m) != nil {
					return
				}
			}
		}()
		<-time.After(s.srv.cfg.TransferTimeout + 11*time.Second)
		if n := s.count("buffered_bytes"); n != 0 {
			t.Errorf("%v bytes kept after the time-out", n)
		}
	})
}

func (p *peer) answer(ping *Message) error {
	_, err := p.Write(appendFrame(nil, &Message{Code: codes.Pong, Token: ping.Token}))
	return err
}

// When the common buffer is used up, a transfer is answered with 5.03 and a time to retry.
func TestTransferOverBudget(t *testing.T) {
	bubble(t, echoHandler(), func(c *Config) { c.MaxBuffered = 6000 }, func(t *testing.T, s *sim) {
		p := s.dial(t)
		r := sendBlocks(t, p, pattern(20_000), 6, 1024, nil)
		wantCode(t, r, codes.ServiceUnavailable)
		if _, ok := r.Uint(MaxAge); !ok {
			t.Error("no Max-Age")
		}
	})
}
