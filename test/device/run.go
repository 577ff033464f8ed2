package device

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Times of a device's life, those of iotivity-lite where it has them.
const (
	pingEvery   = 20 * time.Second
	pingTimeout = 4 * time.Second
	// askTimeout is that over UDP and DTLS, where a lost datagram is sent again for ten seconds.
	askTimeout = 12 * time.Second
	firstRetry = time.Second
	lastRetry  = time.Minute
	// settled is how long a session must last for the next break to be retried soon again.
	settled = 30 * time.Second
)

// errEnded is the end of a connection that the hub closed.
var errEnded = errors.New("the hub closed the connection")

// errRefused is an answer that means: the credential is bad.
var errRefused = errors.New("the hub refused the credential")

// laterError is an answer that says when to come again.
type laterError struct{ Answer }

func (e laterError) Error() string {
	return fmt.Sprintf("the hub answered %v, and to come again in %d s", e.Answer, e.MaxAge)
}

// Run is a device's life until ctx ends: it connects, signs up with a code of its own when it has no credentials, refreshes
// them when they are old or refused, signs in, publishes, pings, and comes back after every break: at once when it was sent elsewhere,
// else later and later with jitter. code is asked each time the device has to sign up. It returns ctx's error.
func (d *Device) Run(ctx context.Context, code func(context.Context) (string, error)) error {
	defer d.Close()
	wait := firstRetry
	for first := true; ; first = false {
		if !first {
			d.stats.Reconnects.Add(1)
		}
		begin := time.Now()
		err := d.session(ctx, code)
		d.Close()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.stats.Failures.Add(1)
		d.log.Info("connection lost", "error", err)
		if time.Since(begin) > settled {
			wait = firstRetry
		}
		// Between half of it and all of it, so that a fleet does not come back at one moment; a hub that says when to come has
		// seen to that itself.
		pause := wait/2 + rand.N(wait/2+1)
		if e := (laterError{}); errors.As(err, &e) {
			pause = max(pause, time.Duration(e.MaxAge)*time.Second)
		}
		if d.sentElsewhere(err) && time.Since(begin) > firstRetry {
			pause = 0
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		wait = min(2*wait, lastRetry)
	}
}

// sentElsewhere reports that the hub ended the session so that the device comes back to another one: it released the connection (RFC 8323,
// 5.5), or, over DTLS, said close_notify.
func (d *Device) sentElsewhere(err error) bool {
	return d.released.Load() || d.over.datagrams && d.over.secure && errors.Is(err, errEnded)
}

// session is one connection from its begin to its end.
func (d *Device) session(ctx context.Context, code func(context.Context) (string, error)) error {
	if err := d.Connect(ctx); err != nil {
		return err
	}
	if err := d.enter(ctx, code); err != nil {
		return err
	}
	d.stats.Online.Add(1)
	defer d.stats.Online.Add(-1)
	done := d.Done()
	// The first ping of each device comes at its own time.
	ping := time.NewTimer(rand.N(pingEvery))
	defer ping.Stop()
	refresh := time.NewTimer(d.untilRefresh())
	defer refresh.Stop()
	patience := pingTimeout
	if d.over.datagrams {
		patience = askTimeout
	}
	for {
		select {
		case <-ctx.Done():
			if d.over.datagrams && !d.over.secure { // nobody else would tell the hub that it went
				own, stop := context.WithTimeout(context.WithoutCancel(ctx), pingTimeout)
				_, _ = d.SignOut(own)
				stop()
			}
			return ctx.Err()
		case <-done:
			return errEnded
		case <-ping.C:
			own, stop := context.WithTimeout(ctx, patience)
			err := d.Ping(own)
			stop()
			if err != nil {
				return fmt.Errorf("ping: %w", err)
			}
			ping.Reset(pingEvery)
		case <-refresh.C:
			if err := d.settle(d.Refresh(ctx)); err != nil {
				return fmt.Errorf("refresh: %w", err)
			}
			refresh.Reset(d.untilRefresh())
		}
	}
}

// enter goes from connected to published.
func (d *Device) enter(ctx context.Context, code func(context.Context) (string, error)) error {
	c := d.Credentials()
	switch {
	case c.Access == "" && c.Refresh == "":
		text, err := d.lost, error(nil)
		if text == "" {
			text, err = code(ctx)
		}
		if err != nil {
			return fmt.Errorf("get a code: %w", err)
		}
		a, err := d.SignUp(ctx, text)
		if d.lost = ""; err != nil {
			d.lost = text // no answer: the hub may have taken the code, so it is tried again
		}
		if err := d.settle(a, err); err != nil {
			return fmt.Errorf("sign up: %w", err)
		}
	case c.Access == "" || !c.Expires.IsZero() && time.Until(c.Expires) < 10*time.Second:
		err := d.settle(d.Refresh(ctx))
		if errors.Is(err, errRefused) {
			d.SetCredentials(Credentials{}) // nothing is left: sign up again
		}
		if err != nil {
			return fmt.Errorf("refresh: %w", err)
		}
	}
	err := d.settle(d.SignIn(ctx))
	if errors.Is(err, errRefused) {
		// iotivity-lite drops the access token and tries the refresh token; without one it forgets the registration.
		c := d.Credentials()
		if c.Access = ""; c.Refresh == "" {
			c = Credentials{}
		}
		d.SetCredentials(c)
	}
	if err != nil {
		return fmt.Errorf("sign in: %w", err)
	}
	if err := d.settle(d.Publish(ctx)); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	return nil
}

// settle makes an error of an answer that is not 2.xx; 4.01 is errRefused, 5.03 with Max-Age a laterError.
func (d *Device) settle(a Answer, err error) error {
	switch {
	case err != nil:
		return err
	case a.OK():
		return nil
	case a.Code == codes.Unauthorized:
		return fmt.Errorf("%w: %v", errRefused, a)
	case a.Code == codes.ServiceUnavailable && a.MaxAge > 0:
		return laterError{a}
	}
	return fmt.Errorf("the hub answered %v", a)
}

// untilRefresh is three quarters to nine tenths of what the access token has left; never expires is a year.
func (d *Device) untilRefresh() time.Duration {
	c := d.Credentials()
	if c.Expires.IsZero() || c.Refresh == "" {
		return 365 * 24 * time.Hour
	}
	left := max(time.Until(c.Expires), 0)
	return left*3/4 + time.Duration(rand.Float64()*0.15*float64(left))
}
