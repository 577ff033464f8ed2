package client_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/coaphub/coaphub/client"
)

// examples is the world that the examples share: examples have no testing.T.
var examples shared

type shared struct {
	testing.TB // nil: what is not below is not called
	w          *world
	ends       []func()
}

func (s *shared) world() *world {
	if s.w == nil {
		s.w = start(s, "lamp")
	}
	return s.w
}

func (s *shared) end() {
	for _, end := range s.ends {
		defer end()
	}
	s.ends = nil
}

func (s *shared) Helper()                        {}
func (s *shared) Cleanup(f func())               { s.ends = append(s.ends, f) }
func (s *shared) Context() context.Context       { return context.Background() }
func (s *shared) Failed() bool                   { return false }
func (s *shared) Errorf(format string, a ...any) { fmt.Printf(format+"\n", a...) }
func (s *shared) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }
func (s *shared) Fatal(a ...any)                 { panic(fmt.Sprint(a...)) }
func (s *shared) TempDir() string {
	dir, err := os.MkdirTemp("", "client")
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// Where the hub is and who asks is said once; coaphub token prints a token.
func ExampleNew() {
	server, token := examples.world().HTTP, examples.world().Token(&examples)

	c, err := client.New(client.Config{Server: server, Token: client.Static(token)})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	for d, err := range c.ListDevices(context.Background(), client.DeviceQuery{Status: []string{"ONLINE"}}) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(d.Name, d.Metadata.Twin.State)
	}
	// Output: lamp IN_SYNC
}

// A light is switched on, by its device; one that does not answer in time is told from one that refuses.
func ExampleClient_UpdateResource() {
	ctx, c := context.Background(), examples.world().c

	for _, href := range []string{"/light/1", "/info"} {
		answer, err := c.UpdateResource(ctx, lamp, href, map[string]any{"state": true}, client.CommandOptions{TTL: 5 * time.Second})
		var e *client.Error
		switch {
		case errors.Is(err, client.Deadline):
			fmt.Println("it does not answer")
		case errors.As(err, &e) && e.Outcome != nil:
			fmt.Println("it refuses:", e.Outcome.Status)
		case err != nil:
			fmt.Println(err)
		default:
			var light struct{ State bool }
			if err := answer.Decode(&light); err != nil {
				fmt.Println(err)
			}
			fmt.Println("the light is on:", light.State)
		}
	}
	// Output:
	// the light is on: true
	// it refuses: METHOD_NOT_ALLOWED
}

// What happens is heard as it happens. A program that keeps the newest token goes on behind it when it starts again.
func ExampleClient_Watch() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c := examples.world().c

	f := client.EventFilter{Kinds: []client.EventKind{client.Updated}, DeviceIDs: []string{lamp}}
	for e, err := range c.Watch(ctx, f) {
		if err != nil {
			fmt.Println(err)
			return
		}
		f.Resume = e.ResumeToken // a program that ends and comes back keeps it in a file
		if e.Kind == client.Live {
			if _, err := c.UpdateResource(ctx, lamp, "/light/1", map[string]int{"power": 70}, client.CommandOptions{}); err != nil {
				fmt.Println(err)
				return
			}
			continue
		}
		var light struct{ Power int }
		if err := e.Change.Decode(&light); err != nil {
			fmt.Println(err)
		}
		fmt.Println(e.Kind, e.Href(), light.Power)
		break
	}
	fmt.Println("there is a place to go on:", f.Resume != "")
	// Output:
	// resourceUpdated /light/1 70
	// there is a place to go on: true
}

// A person signs in with a browser, anywhere.
func ExampleLogin() {
	ctx, w := context.Background(), examples.world()
	w.User(&examples, "carol", "correct horse battery", "user")

	conf, err := w.c.GetConfiguration(ctx) // needs no token
	if err != nil {
		fmt.Println(err)
		return
	}
	grant, err := client.Login(ctx, client.Provider{Issuer: conf.Authority}, []string{"devices:read"}, func(p client.Prompt) error {
		fmt.Println("open the page and type the code")
		w.Approve(&examples, p.URL, p.Code, "carol", "correct horse battery") // what the person does
		return nil
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	keep := func(client.Grant) error { return nil } // a program that goes on for months keeps it in a file
	c, err := client.New(client.Config{Server: w.HTTP, Token: grant.Source(keep)})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	_, err = c.GetDevice(ctx, lamp)
	fmt.Println("it is another owner's:", errors.Is(err, client.NotFound))
	// Output:
	// open the page and type the code
	// it is another owner's: true
}
