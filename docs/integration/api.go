// An API in Go that stores the UUID with its work and reports completion:
//
//	PORT=9000 DB=calls.db ACKER_URL=http://127.0.0.1:8081 TOKEN_FILE=token go run .
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	_ "modernc.org/sqlite"

	"github.com/holdfast-io/holdfast/pkg/completion"
)

const schema = `CREATE TABLE IF NOT EXISTS calls (
	id           INTEGER PRIMARY KEY,
	request_uuid TEXT NOT NULL UNIQUE,
	body         BLOB NOT NULL
)`

// store stores a call and its UUID in one transaction and returns the call's id.
func store(ctx context.Context, db *sql.DB, uuid string, body []byte) (id int64, err error) {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback() // does nothing after the commit
	_, err = tx.ExecContext(ctx,
		`INSERT INTO calls (request_uuid, body) VALUES (?, ?) ON CONFLICT (request_uuid) DO NOTHING`, uuid, body)
	if err != nil {
		return 0, err
	}
	// When that changed no row the work is done already, and other writes of
	// this request would be skipped here.
	err = tx.QueryRowContext(ctx, `SELECT id FROM calls WHERE request_uuid = ?`, uuid).Scan(&id)
	if err != nil {
		return 0, err
	}
	return id, tx.Commit()
}

func create(db *sql.DB) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		req, ok := completion.FromContext(r.Context())
		if !ok {
			http.Error(w, "X-Request-UUID is missing", http.StatusBadRequest)
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			http.Error(w, "body: "+err.Error(), http.StatusBadRequest)
			return
		}
		id, err := store(r.Context(), db, req.ID, body)
		if err != nil {
			log.Print("call not stored: ", err)
			http.Error(w, "not stored", http.StatusInternalServerError) // reported as failed
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated) // reported as processed
		_ = json.NewEncoder(w).Encode(map[string]int64{"id": id})
	}
}

func run() error {
	db, err := sql.Open("sqlite", os.Getenv("DB")+
		"?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_txlock=immediate")
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.Exec(schema); err != nil {
		return err
	}
	client, err := completion.New(completion.Options{
		URL:       os.Getenv("ACKER_URL"),
		TokenFile: os.Getenv("TOKEN_FILE"),
	})
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /calls", create(db))
	server := &http.Server{Handler: completion.Middleware(client)(mux)}

	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Getenv("PORT"))
	if err != nil {
		return err
	}
	fmt.Println("http://" + listener.Addr().String())
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.Fatal(err)
		}
	}()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	<-ctx.Done()
	limit, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(server.Shutdown(limit), client.Close(limit)) // in this order
}

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}
