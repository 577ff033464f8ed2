package bus

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
)

// ping is how often the server is asked whether it is there, and pings how often in vain before the connection is given up.
const ping, pings = time.Second, 3

// Prefix is what all subjects of a hub begin with.
func Prefix(hubID string) string { return "coaphub." + hubID + "." }

// Dial makes a connection to the servers of the configuration, which must be valid, for a hub; name is what their operator sees.
// It does not wait for a server, and looks for one for ever, until the connection is closed: while there is none, what is sent
// fails at once. changed is called each time that a server is reached or lost, one call after the other.
func Dial(cfg Config, hubID, name string, log *slog.Logger, changed func(connected bool)) (*nats.Conn, error) {
	opts, err := cfg.options()
	if err != nil {
		return nil, err
	}
	opts = append(opts,
		nats.Name(name), nats.CustomInboxPrefix(Prefix(hubID)+"inbox"),
		nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(250*time.Millisecond), nats.ReconnectJitter(250*time.Millisecond, time.Second),
		// What was not sent at once is answered with an error: the caller is gone, or has done something else, when it goes out late.
		nats.ReconnectBufSize(-1),
		nats.IgnoreAuthErrorAbort(), // credentials are read at each attempt: an operator may be replacing them
		nats.PingInterval(ping), nats.MaxPingsOutstanding(pings), nats.Timeout(5*time.Second), nats.FlusherTimeout(5*time.Second),
		nats.ConnectHandler(func(c *nats.Conn) {
			changed(true)
			log.Info("NATS is there", "server", c.ConnectedUrlRedacted())
		}),
		nats.ReconnectHandler(func(c *nats.Conn) {
			changed(true)
			log.Info("NATS is back", "server", c.ConnectedUrlRedacted())
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			changed(false)
			log.Warn("NATS is away", "error", err)
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) { log.Debug("NATS cannot be reached", "error", err) }),
		nats.ErrorHandler(func(_ *nats.Conn, s *nats.Subscription, err error) {
			subject := ""
			if s != nil {
				subject = s.Subject
			}
			log.Error("NATS", "subject", subject, "error", err)
		}),
	)
	conn, err := nats.Connect(cfg.addresses(), opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	return conn, nil
}
