package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/smallstep/pkcs7"
	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/test/device"
)

// agent is a device that gets its certificate by itself: a client of EST over CoAP (RFC 9148), built on another engine than the
// hub's.
type agent struct {
	p                process
	server           string
	ca, pin          string // a file; or the SHA-256 of the root
	token            string
	cert, key        string // files
	identity, psk    string
	out              string
	renew, asJSON    bool
	before, patience time.Duration
}

func newAgent(p process) *cobra.Command {
	a := agent{p: p}
	var before, patience string
	enroll := &cobra.Command{
		Use:   "enroll --server URL --out DIR (--token T | --cert F --key F | --psk-identity I --psk K | --renew)",
		Short: "On a device: make a key and get a certificate for it",
		Long: "enroll makes a key that never leaves the device, gets a certificate for it by EST over CoAP (RFC 9148), and writes cert.pem (the\n" +
			"chain), key.pem and ca.pem, as coaphub onboard --out does. It proves by a one-time token (coaphub enroll token add), a\n" +
			"manufacturer's certificate (coaphub enroll group add), or a pre-shared key (coaphub onboard --psk) that it may. Where a person\n" +
			"has to allow the device it asks until that was done.\n\n" +
			"Whom to trust: --ca is the hub's root for devices (coaphub ca root), --ca-sha256 its SHA-256, which coaphub enroll token add\n" +
			"prints. A pre-shared key needs neither.\n\n" +
			"It may be repeated after any failure, with the same result: the key is kept until there is a certificate for it, and with one it\n" +
			"has nothing to do. --renew asks for the next one, under the one that there is and for a new key; with --before it fits a daily\n" +
			"timer. Whatever goes wrong, also if power fails, cert.pem and key.pem belong together.",
		Example: "  coaphub agent enroll --server coaps://hub:15684 --ca ca.pem --token T --out /etc/lamp\n" +
			"  coaphub agent enroll --server coaps+tcp://hub:15684 --ca ca.pem --cert factory.pem --key factory.key --out /etc/lamp\n" +
			"  coaphub agent enroll --server coaps://hub:15684 --out /etc/lamp --renew --before 30d",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.check(); err != nil {
				return err
			}
			var err error
			if a.patience, err = conf.ParseDuration(patience); err != nil || a.patience <= 0 {
				return usage("--timeout: %q is not a duration above zero; write for example 10m or 1d", patience)
			}
			if before != "" {
				if a.before, err = conf.ParseDuration(before); err != nil || a.before <= 0 {
					return usage("--before: %q is not a duration above zero; write for example 30d", before)
				}
				if !a.renew {
					return usage("--before belongs to --renew")
				}
			}
			return a.run(cmd.Context())
		},
	}
	f := enroll.Flags()
	f.StringVar(&a.server, "server", "", "the hub's door for enrolment: coaps://host:port for DTLS, coaps+tcp://host:port for TLS")
	f.StringVar(&a.ca, "ca", "", "file (PEM) of the root that the hub's certificate must lead to; with --renew by default the folder's ca.pem")
	f.StringVar(&a.pin, "ca-sha256", "", "in place of --ca: the SHA-256 of that root, in hexadecimal")
	f.StringVar(&a.token, "token", "", "one-time token")
	f.StringVar(&a.cert, "cert", "", "file (PEM) of the manufacturer's certificate, and what is between it and the manufacturer's root")
	f.StringVar(&a.key, "key", "", "file (PEM) of its key")
	f.StringVar(&a.identity, "psk-identity", "", "identity of the pre-shared key")
	f.StringVar(&a.psk, "psk", "", "pre-shared key, for coaps://")
	f.StringVar(&a.out, "out", "", "folder for cert.pem, key.pem and ca.pem")
	f.BoolVar(&a.renew, "renew", false, "get another certificate in place of the one in the folder")
	f.StringVar(&before, "before", "", "with --renew: only if it ends within this time, such as 30d")
	f.StringVar(&patience, "timeout", "10m", "how long to go on asking")
	f.BoolVar(&a.asJSON, "json", false, "print JSON, for scripts")
	return group("agent", "What runs on a device", enroll)
}

func (a *agent) check() error {
	u, err := url.Parse(a.server)
	proofs := 0
	for _, given := range []bool{a.token != "", a.cert != "" || a.key != "", a.identity != "" || a.psk != "", a.renew} {
		if given {
			proofs++
		}
	}
	switch {
	case a.out == "":
		return usage("--out is missing: the folder for key and certificate")
	case err != nil || u.Scheme != "coaps" && u.Scheme != "coaps+tcp" || u.Hostname() == "" || u.Port() == "":
		return usage("--server: %q is not coaps://host:port or coaps+tcp://host:port", a.server)
	case proofs != 1:
		return usage("exactly one of --token, --cert with --key, --psk-identity with --psk, and --renew is needed")
	case (a.cert == "") != (a.key == ""):
		return usage("--cert and --key belong together")
	case (a.identity == "") != (a.psk == ""):
		return usage("--psk-identity and --psk belong together")
	case a.psk != "" && u.Scheme != "coaps":
		return usage("--psk is for a server at coaps://")
	case a.ca != "" && a.pin != "":
		return usage("--ca and --ca-sha256 exclude each other")
	case a.psk != "" && a.ca+a.pin != "":
		return usage("--ca and --ca-sha256 are not for --psk: whoever has the key is the hub")
	case a.psk == "" && a.ca+a.pin == "" && !a.renew:
		return usage("--ca or --ca-sha256 is needed: whom may the device trust? coaphub ca root > ca.pem makes the file")
	}
	a.pin = strings.ToLower(strings.ReplaceAll(a.pin, ":", "")) // as openssl writes it
	if b, err := hex.DecodeString(a.pin); a.pin != "" && (err != nil || len(b) != sha256.Size) {
		return usage("--ca-sha256: 64 hexadecimal digits are needed")
	}
	return nil
}

// run gets a certificate if one is needed.
func (a *agent) run(ctx context.Context) error {
	id, err := openIdentity(a.out)
	if err != nil {
		return err
	}
	defer id.close()
	have, err := id.current()
	if err != nil {
		return err
	}
	switch now := time.Now(); {
	case a.renew && have == nil:
		return fmt.Errorf("there is no certificate in %s to renew; enrol without --renew", a.out)
	case a.renew && now.After(have.Leaf.NotAfter):
		return fmt.Errorf("the certificate in %s ended on %s; enrol without --renew", a.out, have.Leaf.NotAfter.Local().Format(time.DateTime))
	case a.renew && a.before > 0 && have.Leaf.NotAfter.Sub(now) > a.before, !a.renew && have != nil && now.Before(have.Leaf.NotAfter):
		return a.print(have.Leaf, false)
	}
	key, err := id.nextKey(have)
	if err != nil {
		return err
	}
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, a.patience)
	defer cancel()
	e, err := a.prepare(ctx, id, have, key)
	if err != nil {
		return err
	}
	for met := false; ; {
		chain, anchors, err := e.attempt(ctx)
		if err == nil {
			if err := id.install(chain, key, anchors); err != nil {
				return err
			}
			return a.print(chain[0], true)
		}
		var answer *client.Error
		if !errors.As(err, &answer) || answer.Kind != client.Unavailable {
			return err
		}
		away := answer.Code == client.ErrUnreachable
		if away && !met && ctx.Err() == nil {
			return err // a hub that was never there is more likely a slip of the pen
		}
		met = met || !away
		wait := min(max(answer.RetryAfter, time.Second), time.Hour)
		if ctx.Err() == nil {
			_, _ = fmt.Fprintf(a.p.err, "%s; asking again in %v\n", sentence(answer), wait)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			if whole.Err() != nil {
				return errors.New("stopped; the same command goes on where this one was")
			}
			answer.Message = "it took too long, and the same command goes on where this one was: " + answer.Message
			return answer
		}
	}
}

func (a *agent) print(leaf *x509.Certificate, issued bool) error {
	dev := strings.TrimPrefix(leaf.Subject.CommonName, "uuid:")
	if a.asJSON {
		return printJSON(a.p.out, struct {
			DeviceID string    `json:"deviceId"`
			Serial   string    `json:"serial"`
			NotAfter time.Time `json:"notAfter"`
			Issued   bool      `json:"issued"` // false: there was nothing to do
			Out      string    `json:"out"`
		}{dev, hub.SerialOf(leaf.SerialNumber), leaf.NotAfter, issued, a.out})
	}
	what := "nothing to do:"
	if issued {
		what = "wrote cert.pem, key.pem and ca.pem:"
	}
	_, err := fmt.Fprintf(a.p.out, "%s %s has a certificate of device %s until %s\n", what, a.out, plain(dev), leaf.NotAfter.Local().Format(time.DateTime))
	return err
}

// enrolment is one that is under way.
type enrolment struct {
	device  device.Config
	request device.Request
	key     crypto.Signer
	renewed *x509.Certificate // nil if it is the first
	shown   string            // what the operator sees of a device that waits
}

// prepare makes the request, and finds out whom to trust.
func (a *agent) prepare(ctx context.Context, id *identity, have *tls.Certificate, key crypto.Signer) (*enrolment, error) {
	e := &enrolment{device: device.Config{ID: "agent", HubAddr: a.server, Blockwise: true}, key: key}
	var own *tls.Certificate
	var subject x509.CertificateRequest
	switch {
	case a.renew:
		// RFC 7030, Section 4.2.2: subject and alternative names are those of the certificate that is renewed.
		own, e.renewed, subject.RawSubject = have, have.Leaf, have.Leaf.RawSubject
	case a.cert != "":
		pair, err := tls.LoadX509KeyPair(a.cert, a.key)
		if err != nil {
			return nil, fmt.Errorf("the manufacturer's certificate: %w", err)
		}
		own, subject.RawSubject = &pair, pair.Leaf.RawSubject
		e.shown = fmt.Sprintf("factory certificate %s of %s", hub.SerialOf(pair.Leaf.SerialNumber), pair.Leaf.Issuer.CommonName)
	case a.psk != "":
		e.device.PSK = &device.PSK{Identity: a.identity, Key: []byte(a.psk)}
	}
	if e.device.PSK == nil {
		trusted, err := a.trusted(ctx, id)
		if err != nil {
			return nil, err
		}
		if e.device.TLS, err = a.tls(trusted, own); err != nil {
			return nil, err
		}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &subject, key)
	if err != nil {
		return nil, fmt.Errorf("make the request: %w", err)
	}
	e.request = device.Request{Code: codes.POST, Path: estPath + "sen", Body: csr, Format: formatRequest, Accept: formatCertsOnly}
	switch {
	case a.renew:
		e.request.Path = estPath + "sren"
	case a.token != "":
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})
		body, err := cbor.Marshal(map[string]string{"token": a.token, "csr": string(text)})
		if err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		e.request = device.Request{Code: codes.POST, Path: tokenPath, Body: body, Format: message.AppCBOR, Accept: message.AppCBOR}
	}
	return e, nil
}

// RFC 9148, Sections 5.1 and 5.3, and the path for one-time tokens.
const (
	estPath         = "/.well-known/est/"
	tokenPath       = "/api/v1/enrolment"
	formatCertsOnly = message.MediaType(281)
	formatRequest   = message.MediaType(286)
)

// tls is the device's side of the handshake. The host must be one that the hub's certificate names (RFC 7030, Section 3.6.1):
// certificates of devices have the same root, and a device that passed itself off as the hub would get others' tokens.
func (a *agent) tls(trusted []byte, own *tls.Certificate) (*tls.Config, error) {
	cfg, err := device.TLS(trusted, nil, nil, "")
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(a.server)
	if err != nil {
		return nil, err
	}
	chained := cfg.VerifyConnection
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		if err := chained(s); err != nil {
			return err
		}
		if err := s.PeerCertificates[0].VerifyHostname(u.Hostname()); err != nil {
			return fmt.Errorf("the hub's certificate is for another address; externalAddress, on the hub, is what it is reached at: %w", err)
		}
		return nil
	}
	if own != nil {
		cfg.Certificates = []tls.Certificate{*own}
	}
	return cfg, nil
}

// trusted is what the hub's certificate must lead to, PEM.
func (a *agent) trusted(ctx context.Context, id *identity) ([]byte, error) {
	if a.pin == "" {
		b, err := os.ReadFile(cmp.Or(a.ca, id.path("ca.pem")))
		if err != nil {
			return nil, fmt.Errorf("read the CA: %w", err)
		}
		return b, nil
	}
	// Whoever is there is asked for his root, and told nothing; he is the hub's only if it is the one that was named (RFC 7030,
	// Section 4.1.1). The next connection has to lead to it.
	e := enrolment{device: device.Config{ID: "agent", HubAddr: a.server, Blockwise: true, TLS: &tls.Config{
		MinVersion: tls.VersionTLS12, CurvePreferences: []tls.CurveID{tls.CurveP256},
		InsecureSkipVerify: true, //nolint:gosec // see above
	}}}
	d, err := e.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	anchors, err := e.anchors(ctx, d)
	if err != nil {
		return nil, err
	}
	for _, c := range anchors {
		if sum := sha256.Sum256(c.Raw); hex.EncodeToString(sum[:]) == a.pin {
			return certsPEM(c), nil
		}
	}
	return nil, errors.New("the root of the hub at this address is not the one of --ca-sha256: this is another hub, or somebody between it and the device")
}

func certsPEM(cs ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range cs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer takes all
	}
	return b.Bytes()
}

// attempt asks once. The chain is the device's certificate and what is between it and the root, and was verified, as anchors are
// those of the hub that was verified.
func (e *enrolment) attempt(ctx context.Context) (chain, anchors []*x509.Certificate, err error) {
	d, err := e.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer d.Close()
	if anchors, err = e.anchors(ctx, d); err != nil {
		return nil, nil, err
	}
	ans, err := e.ask(ctx, d, e.request)
	if err != nil {
		return nil, nil, err
	}
	leaf, err := issued(ans)
	if err != nil {
		return nil, nil, err
	}
	chain, err = e.verify(leaf, anchors)
	return chain, anchors, err
}

func (e *enrolment) connect(ctx context.Context) (*device.Device, error) {
	d, err := device.New(e.device)
	if err != nil {
		return nil, err
	}
	if err := d.Connect(ctx); err != nil {
		return nil, e.unanswered(err)
	}
	return d, nil
}

// unanswered tells a hub that is away, which can be asked again, from one that is not trusted, or does not take the device's
// certificate.
func (e *enrolment) unanswered(err error) error {
	var name *net.DNSError
	away := errors.As(err, &name) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, os.ErrDeadlineExceeded)
	for _, no := range []error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT} {
		away = away || errors.Is(err, no)
	}
	switch {
	case away:
		return &client.Error{
			Kind: client.Unavailable, Code: client.ErrUnreachable, Message: "the hub cannot be reached: " + err.Error(), RetryAfter: 10 * time.Second, Err: err,
		}
	case e.shows():
		return fmt.Errorf("%w (if the hub does not take this certificate, coaphub status --refused says why there)", err)
	}
	return err
}

func (e *enrolment) shows() bool { return e.device.TLS != nil && len(e.device.TLS.Certificates) > 0 }

// ask asks the hub, and makes an error of an answer that is not 2.xx.
func (e *enrolment) ask(ctx context.Context, d *device.Device, q device.Request) (device.Answer, error) {
	// The hub thinks for half a minute at most.
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	ans, err := d.Do(ctx, q)
	switch {
	case err == nil && ans.OK():
		return ans, nil
	case err != nil && ctx.Err() == nil && q.Code == codes.GET && e.shows():
		// RFC 8446, Section 4.4.2.4: whoever does not take a client's certificate says so after the handshake, and go-coap loses it.
		return ans, fmt.Errorf("the hub ended the connection, and may not take this certificate (coaphub status --refused says why there): %w", err)
	case err != nil:
		return ans, e.unanswered(err)
	}
	code, text, ok := strings.Cut(string(ans.Raw), ": ")
	if !ok {
		code, text = ans.Code.String(), "the hub answered "+ans.String()
	}
	failed := &client.Error{Kind: client.Invalid, Code: client.Code(plain(code)), Message: plain(text)}
	switch ans.Code {
	case codes.ServiceUnavailable, codes.TooManyRequests:
		failed.Kind, failed.RetryAfter = client.Unavailable, 5*time.Second
		if ans.MaxAge >= 0 {
			failed.RetryAfter = time.Duration(ans.MaxAge) * time.Second
		}
	case codes.Unauthorized:
		failed.Kind = client.Unauthenticated
	case codes.Forbidden:
		failed.Kind = client.Denied
	}
	if code == "enrolment-waiting" && e.shown != "" {
		failed.Message += "; coaphub enroll list shows it as " + e.shown
	}
	return ans, failed
}

// anchors are the hub's root and what issues under it.
func (e *enrolment) anchors(ctx context.Context, d *device.Device) ([]*x509.Certificate, error) {
	ans, err := e.ask(ctx, d, device.Request{Code: codes.GET, Path: estPath + "crts", Accept: formatCertsOnly})
	if err != nil {
		return nil, err
	}
	bag, err := pkcs7.Parse(ans.Raw)
	if err != nil {
		return nil, fmt.Errorf("the hub's CA certificates: %w", err)
	}
	return bag.Certificates, nil
}

// issued is the certificate in an answer.
func issued(ans device.Answer) (*x509.Certificate, error) {
	if ans.Body != nil { // of the path for one-time tokens
		block, _ := pem.Decode([]byte(ans.Text("certificate")))
		if block == nil {
			return nil, errors.New("the hub's answer has no certificate")
		}
		return x509.ParseCertificate(block.Bytes)
	}
	bag, err := pkcs7.Parse(ans.Raw)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the hub's answer: %w", err)
	case len(bag.Certificates) != 1:
		return nil, fmt.Errorf("the hub's answer has %d certificates", len(bag.Certificates))
	}
	return bag.Certificates[0], nil
}

// verify sees that the certificate is of the key and leads to the hub's root, and returns its chain without that.
func (e *enrolment) verify(leaf *x509.Certificate, anchors []*x509.Certificate) ([]*x509.Certificate, error) {
	if of, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !of.Equal(e.key.Public()) {
		return nil, errors.New("the certificate that the hub gave is of another key")
	}
	if e.renewed != nil && !bytes.Equal(leaf.RawSubject, e.renewed.RawSubject) {
		return nil, fmt.Errorf("the certificate that the hub gave is of %s, and not of %s", leaf.Subject, e.renewed.Subject)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range anchors {
		if c.CheckSignatureFrom(c) == nil {
			roots.AddCert(c)
		} else {
			between.AddCert(c) // also a root that the one before it has signed (RFC 7030, Section 4.1.3)
		}
	}
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return nil, fmt.Errorf("the certificate that the hub gave: %w", err)
	}
	short := slices.MinFunc(chains, func(a, b []*x509.Certificate) int { return len(a) - len(b) })
	return short[:len(short)-1], nil
}
