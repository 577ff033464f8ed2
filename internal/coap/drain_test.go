package coap

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Peers are released (RFC 8323, Section 5.5) in turns that are spread evenly; nobody new comes in; what a peer had sent before it learned
// of it is answered, or taken.
func TestDrain(t *testing.T) {
	var reported []string
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			reported = append(reported, string(n.Message.Payload))
		}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		type end struct {
			released, eof time.Duration
		}
		began := time.Now()
		ends := make(chan end, 4)
		for range 3 { // who do not close by themselves
			p := s.dial(t)
			c := <-s.conns
			r := observe(c, t.Context(), "/light")
			asked := p.read()
			first := reply(asked, codes.Content, "first")
			first.Options = AddUint(nil, message.Observe, 1)
			p.send(first)
			<-r
			go func() {
				m := p.read()
				wantCode(t, m, codes.Release)
				e := end{released: time.Since(began)}
				wantCode(t, p.ask(get("/a")), codes.Content)
				for {
					if _, _, err := p.next(); errors.Is(err, io.EOF) {
						break
					}
				}
				e.eof = time.Since(began)
				late := reply(asked, codes.Content, "late")
				late.Options = AddUint(nil, message.Observe, 2)
				p.send(late)
				_ = p.Close()
				ends <- e
			}()
		}
		s.srv.Drain(t.Context(), 3*time.Second, time.Minute)
		var at []time.Duration
		for range 3 {
			e := <-ends
			at = append(at, e.released)
			if e.eof-e.released != releaseTime {
				t.Errorf("released after %v, the end came after %v", e.released, e.eof)
			}
			wantReason(t, s.reason(t), ErrShutdown)
		}
		slices.Sort(at)
		if want := []time.Duration{0, time.Second, 2 * time.Second}; !slices.Equal(at, want) {
			t.Errorf("released after %v, want %v", at, want)
		}
		if want := []string{"late", "late", "late"}; !slices.Equal(reported, want) {
			t.Errorf("%q was reported", reported)
		}
		select {
		case s.ln.conns <- nil:
			t.Error("somebody new was let in")
		case <-s.ln.done:
		}
	})
}

// Whoever closes after the Release, as it says, is gone at once.
func TestDrainOfWhoCloses(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		go func() {
			wantCode(t, p.read(), codes.Release)
			_ = p.Close()
		}()
		began := time.Now()
		s.srv.Drain(t.Context(), 0, time.Minute)
		if took := time.Since(began); took != 0 {
			t.Errorf("it took %v", took)
		}
		wantReason(t, s.reason(t), ErrShutdown)
	})
}

// A peer with something under way goes when that is over, or when its time is.
func TestDrainWaits(t *testing.T) {
	for _, tc := range []struct {
		name       string
		busy, want time.Duration
	}{{"what ends", 700 * time.Millisecond, 700 * time.Millisecond}, {"what does not", time.Hour, 3 * time.Second}} {
		t.Run(tc.name, func(t *testing.T) {
			h := handlerFuncs{leave: func(gone func()) { time.AfterFunc(tc.busy, gone) }}
			bubble(t, h, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				began := time.Now()
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					wantCode(t, p.read(), codes.Release)
					if took := time.Since(began); took != tc.want {
						t.Errorf("released after %v, want %v", took, tc.want)
					}
					_ = p.Close()
				}()
				s.srv.Drain(t.Context(), time.Second, 2*time.Second)
				<-ended
				time.Sleep(tc.busy) // the bubble's: until what was under way comes to its end
			})
		})
	}
}

// A peer whose connection is complete while the others are sent elsewhere follows them.
func TestDrainOfWhoComesLate(t *testing.T) {
	open := make(chan struct{})
	synctest.Test(t, func(t *testing.T) {
		open = make(chan struct{})
		s := startSim(t, handlerFuncs{open: func(*Conn) error { <-open; return nil }}, nil)
		defer s.stop()
		p := s.dial(t)
		synctest.Wait()
		drained := make(chan struct{})
		go func() { defer close(drained); s.srv.Drain(t.Context(), 0, time.Minute) }()
		synctest.Wait()
		close(open)
		wantCode(t, p.read(), codes.Release)
		_ = p.Close()
		<-drained
	})
}

// Over DTLS the word is a close_notify, and a hello gets no answer.
func TestDrainDTLS(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		d := s.dialPSK(t, "198.51.100.1:5000", true)
		d.ask("/a")
		s.srv.Drain(t.Context(), time.Second, time.Second)
		wantReason(t, s.reason(t), ErrShutdown)
		_ = d.conn.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := d.conn.Read(make([]byte, 100)); !errors.Is(err, io.EOF) {
			t.Errorf("the device read %v", err)
		}
		sent, _ := s.traffic("198.51.100.2:9")
		s.forge(t, "198.51.100.2:9", hello(1))
		synctest.Wait()
		if now, _ := s.traffic("198.51.100.2:9"); now != sent {
			t.Errorf("a hello was answered with %d bytes", now-sent)
		}
	})
}
