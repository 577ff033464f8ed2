package grpcgateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"time"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
)

// keepAlive is how often a quiet stream shows that it is alive, so that proxies and readers do not take it for dead.
const keepAlive = 10 * time.Second

// subscription reads what a subscription over server-sent events asks for.
func (q query) subscription() (*pb.SubscribeToEvents_CreateSubscription, error) {
	m := &pb.SubscribeToEvents_CreateSubscription{
		DeviceIdFilter: q["deviceIdFilter"], HrefFilter: q["hrefFilter"], LeadResourceTypeFilter: q["leadResourceTypeFilter"],
		ResumeToken: q.get("resumeToken"),
	}
	for _, s := range q["eventFilter"] {
		n, known := pb.SubscribeToEvents_CreateSubscription_Event_value[s]
		if !known {
			i, err := strconv.ParseInt(s, 10, 32)
			if err != nil {
				return nil, invalid("query-invalid", "eventFilter is no kind of events")
			}
			n = int32(i)
		}
		m.EventFilter = append(m.EventFilter, apiKind(n))
	}
	for _, s := range q["resourceIdFilter"] {
		m.ResourceIdFilter = append(m.ResourceIdFilter, parseResourceFilter(s))
	}
	var err error
	m.IncludeCurrentState, err = q.strictFlag("includeCurrentState")
	return m, err
}

// subscribeSSE is a subscription over server-sent events (WHATWG HTML, Section 9.2): one a request, named by its query. The
// ID of each event is where to resume, which browsers' clients do by themselves.
func (g *Gateway) subscribeSSE(w http.ResponseWriter, r *request) error {
	m, err := r.query.subscription()
	if err != nil {
		return err
	}
	if last := r.Header.Get("Last-Event-ID"); last != "" {
		m.ResumeToken = last
	}
	proto := r.proto || r.query.get("accept") == "application/protojson"
	st := g.newStream(r.Context(), "sse", r.claims, r.token)
	defer st.close()
	u, err := st.open(m, "")
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Accel-Buffering", "no") // nginx would keep events until it has a page of them
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w).Flush
	write := func(b []byte) error {
		_, err := w.Write(b)
		if err == nil {
			err = flush()
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errStalled.With("sse.write", err)
		}
		return fmt.Errorf("%w: %w", errGone, err)
	}
	st.send = func(t told) error {
		b := append(make([]byte, 0, 1024), "id: "...)
		b = append(append(b, t.token...), "\ndata: "...)
		b, err := g.appendFrame(b, &t, proto)
		if err != nil {
			return err
		}
		return write(append(b, '\n', '\n')) // no frame has a line break: it is JSON
	}
	if err := st.start(u); err != nil {
		return err
	}
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			st.sending.Lock()
			err := write([]byte(":\n\n"))
			st.sending.Unlock()
			if err != nil {
				st.end(err)
			}
			continue
		case <-st.ctx.Done():
		}
		break
	}
	err = context.Cause(st.ctx)
	st.close()
	if !gone(r.Context()) {
		_ = write(append(appendError([]byte(`data: {"error":`), err, false), '}', '\n', '\n')) // a client that is gone needs no answer
	}
	return err
}
